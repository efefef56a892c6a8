"""Another adapter for every row: values, gradients, the number of products, beams, generation, and what is refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.adapters.slot import Slot
from graftwork.errors import GraftworkError, IncompatibleError, UsageError
from graftwork.modeling.protocols import Product
from graftwork.modeling.state import state_of
from graftwork.registry import make_config
from graftwork.storage import Storage
from graftwork.storage.base import apply_storage

ROWS = ["lora", "flora", None, "paca", "nola", "small", "lora", "wide"]


def fleet(model, **options):
    """Six grafts of four methods and several ranks."""
    return {
        "lora": attach(model, "lora", name="lora", seed=1, bias="none", **options),
        "small": attach(model, "lora", name="small", seed=2, **{**options, "r": 1}),
        "nola": attach(model, "nola", name="nola", seed=3, **options),
        "flora": attach(model, "flora", name="flora", seed=4, **options),
        "wide": attach(model, "flora", name="wide", seed=5, **{**options, "r": 3}),
        "paca": attach(model, "paca", name="paca", seed=6, **options),
    }


def alone(grafts, name):
    """Scope in which only this graft is on."""
    stack = ExitStack()
    for other, graft in grafts.items():
        if other != name:
            stack.enter_context(graft.disabled())
    return stack


class Counting(Product):
    """Passes a product on and counts calls and rows."""

    def __init__(self, inner):
        self.inner, self.rows = inner, []
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def product(self, x, leaves=None):
        self.rows.append(x.shape[:-1].numel())
        return self.inner.product(x, leaves)

    def dense(self, leaves=None):
        return self.inner.dense(leaves)

    @property
    def bias(self):
        return self.inner.bias


def count_products(model):
    counters = {}
    for name, module in model.named_modules():
        if isinstance(module, Slot):
            module.frozen = counters[name] = Counting(module.frozen)
    return counters


# -- values and gradients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_mixed_methods_in_inference(kind):
    model = tiny.CAUSAL[kind]()
    grafts, ids = fleet(model), tiny.tokens(len(ROWS), 6)
    with torch.no_grad():
        with graftwork.routing(model, ROWS):
            mixed = output(model, ids)
        for i, name in enumerate(ROWS):
            with alone(grafts, name):
                close(mixed[i: i + 1], output(model, ids[i: i + 1]))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_mixed_methods_in_training(kind):
    """Every graft gets the gradient of its own rows, as if it were trained alone on them; an absent one gets none."""
    model = tiny.CAUSAL[kind]()
    grafts, ids = fleet(model), tiny.tokens(len(ROWS), 6)
    absent = attach(model, "lora", name="absent", seed=8)
    model.train()
    with graftwork.routing(model, ROWS):
        output(model, ids).square().sum().backward()
    mixed = {name: [p.grad for p in graft.parameters()] for name, graft in grafts.items()}
    assert all(p.grad is None for p in absent.parameters())
    everyone = {**grafts, "absent": absent}
    for name, graft in grafts.items():
        model.zero_grad()
        own = torch.tensor([i for i, row in enumerate(ROWS) if row == name])
        with alone(everyone, name):
            output(model, ids[own]).square().sum().backward()
        for got, parameter in zip(mixed[name], graft.parameters(), strict=True):
            if parameter.grad is None:  # an expert that no token chose
                assert got is None or got.abs().max() == 0
            else:
                close(got, parameter.grad, 1e-4)


def test_a_mixed_batch_on_a_merged_reference():
    """Rows agree with models into which the change was written by hand."""
    model = tiny.llama()
    grafts, ids = fleet(model), tiny.tokens(len(ROWS), 6)
    with torch.no_grad(), graftwork.routing(model, ROWS):
        mixed = output(model, ids)
    for i, name in enumerate(ROWS):
        by_hand = tiny.llama()
        if name is not None:
            for site, change in grafts[name].delta_weights().items():
                by_hand.get_submodule(site).weight.data += change
        with torch.no_grad():
            close(mixed[i], output(by_hand, ids[i: i + 1])[0])


# -- one product per site ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_each_site_multiplies_once(kind):
    model = tiny.CAUSAL[kind]()
    attach(model, "lora", name="lora")
    attach(model, "lora", name="small", r=1)
    attach(model, "nola", name="nola")
    attach(model, "paca", name="paca")
    counters = count_products(model)
    ids = tiny.tokens(6, 5)
    with torch.no_grad():
        with graftwork.routing(model, ["lora", "small", None, "nola", "paca", "lora"]):
            output(model, ids)
        calls = {name: counter.rows for name, counter in counters.items()}
        if kind == "mixtral":  # an expert sees the tokens that chose it, once
            experts = {n: r for n, r in calls.items() if "experts" in n}
            assert all(len(r) <= 1 for r in experts.values())
            assert sum(r[0] for n, r in experts.items() if "down" in n and r) == tiny.LAYERS * 2 * ids.numel()
            calls = {n: r for n, r in calls.items() if n not in experts}
        assert calls and all(rows == [ids.numel()] for rows in calls.values())
        for counter in counters.values():
            counter.rows.clear()
        output(model, ids)  # all grafts summed on all rows
        assert all(len(counter.rows) <= 1 for counter in counters.values())


def test_flora_multiplies_once_on_r_fold_rows():
    model = tiny.llama()
    attach(model, "flora", name="one", r=1)
    attach(model, "flora", name="three", r=3)
    attach(model, "lora", name="lora")
    counters, length = count_products(model), 5
    ids = tiny.tokens(4, length)
    for rows, fold in ((["one", "one", "one", "one"], 4), (["three", None, "lora", "three"], 3 * 2 + 2),
                       (["one", "three", None, "lora"], 1 + 3 + 2)):
        with torch.no_grad(), graftwork.routing(model, rows):
            output(model, ids)
        # each row by its own rank, also beside larger ones
        assert all(counter.rows == [fold * length] for counter in counters.values()), (rows, next(iter(counters.values())).rows)
        for counter in counters.values():
            counter.rows.clear()


def test_a_stored_base_multiplies_once(monkeypatch):
    model = tiny.llama()
    apply_storage(model, make_config("storage", "nf4"))
    grafts, ids = fleet(model), tiny.tokens(len(ROWS), 6)
    stored = [m for m in model.modules() if isinstance(m, Storage)]
    calls = []
    plain = type(stored[0]).product

    def counted(self, x, leaves=None):
        calls.append(id(self))
        return plain(self, x, leaves)

    monkeypatch.setattr(type(stored[0]), "product", counted)
    with torch.no_grad():
        with graftwork.routing(model, ROWS):
            mixed = output(model, ids)
        assert sorted(calls) == sorted(id(m) for m in stored)
        for i, name in enumerate(ROWS):
            with alone(grafts, name):
                close(mixed[i: i + 1], output(model, ids[i: i + 1]))


# -- beams, generation --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_expansion_repeats_names():
    model = tiny.llama()
    fleet(model)
    ids = tiny.tokens(6, 5)
    with graftwork.routing(model, ["lora", "lora", None, None, "flora", "flora"]):
        wanted = output(model, ids)
    with graftwork.routing(model, ["lora", None, "flora"], expansion=2):
        close(output(model, ids), wanted, 1e-6)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation(beams):
    model = tiny.llama()
    grafts = fleet(model)
    rows, ids = ["lora", None, "flora", "nola", "paca"], tiny.tokens(5, 6)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0,
                   return_dict_in_generate=True, output_logits=True)
    with graftwork.routing(model, rows, expansion=beams):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for i, name in enumerate(rows):
        with alone(grafts, name):
            single = model.generate(ids[i: i + 1], attention_mask=torch.ones(1, 6, dtype=torch.int64), **options)
        for step in range(len(single.logits)):
            top = single.logits[step].topk(2).values
            close(together.logits[step][i * beams: (i + 1) * beams], single.logits[step])
            assert (top[:, 0] - top[:, 1]).min() > 1e-4, "a near tie: choose another seed"
        assert torch.equal(together.sequences[i], single.sequences[0])


# -- sums of grafts -------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_grafts_add_with_their_weights():
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    first, second, third = (attach(model, m, name=m, seed=i) for i, m in enumerate(["lora", "paca", "nola"]))
    first.scale(0.25)
    third.scale(-2.0)
    by_hand = tiny.llama()
    for graft, weight in ((first, 0.25), (second, 1.0), (third, -2.0)):
        for name, adapter in graft.adapters.items():
            by_hand.get_submodule(name).weight.data += weight * adapter.delta_weight(graft.base_of(graft.sites[name]))
    close(output(model, ids), output(by_hand, ids))


@torch.no_grad()
def test_multiplicative_grafts_do_not_add():
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    attach(model, "flora", name="a")
    other = attach(model, "lora", name="b")
    with pytest.raises(IncompatibleError, match="cannot be added"):
        output(model, ids)
    with other.disabled():
        output(model, ids)
    with graftwork.routing(model, ["a", "b"]):
        output(model, ids)


# -- what is refused ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_wrong_rows_are_refused():
    model = tiny.llama()
    attach(model, "lora", name="lora")
    with graftwork.routing(model, ["lora", None]):
        for rows in (1, 3, 4):
            with pytest.raises(UsageError, match="names 2 rows"):
                output(model, tiny.tokens(rows, 5))
        output(model, tiny.tokens(2, 5))
    with pytest.raises(UsageError, match="did you mean 'lora'"), graftwork.routing(model, ["lara"]):
        pass
    output(model, tiny.tokens(3, 5))  # nothing is left behind
    assert state_of(model).current.rows is None


@torch.no_grad()
def test_a_merged_graft_is_refused():
    model = tiny.llama()
    graft = attach(model, "lora", name="lora")
    attach(model, "paca", name="paca")
    graft.merge()
    with pytest.raises(GraftworkError, match="merged"), graftwork.routing(model, ["lora", "paca"]):
        pass
    with pytest.raises(GraftworkError, match="unmerge"), graft.disabled():
        pass
    graft.unmerge()
    with graftwork.routing(model, ["lora", "paca"]):
        output(model, tiny.tokens(2, 5))


@torch.no_grad()
def test_scopes_nest_and_survive_errors():
    model = tiny.llama()
    grafts, ids = fleet(model), tiny.tokens(2, 5)
    with graftwork.routing(model, ["lora", "nola"]):
        outer = output(model, ids)
        with pytest.raises(ZeroDivisionError), graftwork.routing(model, ["paca", None]):
            inner = output(model, ids)
            1 / 0  # noqa: B018
        assert torch.equal(output(model, ids), outer) and not torch.allclose(inner, outer)
        with grafts["lora"].disabled():
            bare = output(model, ids)[0]
    with graftwork.routing(model, [None, None]):
        close(bare, output(model, ids)[0], 1e-6)


@torch.no_grad()
def test_banks_follow_the_parameters():
    """Stacked banks are kept between calls; a changed parameter must be seen."""
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    grafts = fleet(model)
    for name in ("lora", "nola", "flora", "paca"):
        with graftwork.routing(model, [name, None]):
            before = output(model, ids)
            assert torch.equal(output(model, ids), before)
            for parameter in grafts[name].parameters():
                parameter.mul_(1.5)
            after = output(model, ids)
        assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])
        with alone(grafts, name):
            close(after[0], output(model, ids)[0])


@pytest.mark.parametrize("rows", [None, ["lora", "nola", "paca"]], ids=["summed", "routed"])
def test_inference_mode_leaves_training_possible(rows):
    """What is built and kept during inference must not meet autograd as an inference tensor."""
    model, ids = tiny.llama(), tiny.tokens(3, 5)
    grafts = {m: attach(model, m, name=m, seed=i) for i, m in enumerate(["lora", "nola", "paca"])}
    for parameter in grafts["nola"].parameters():
        parameter.requires_grad_(False)
    with ExitStack() as scopes:
        if rows:
            scopes.enter_context(graftwork.routing(model, rows))
        with torch.inference_mode():
            wanted = output(model, ids)
        got = output(model, ids)
        got.square().sum().backward()
    close(got.detach(), wanted, 1e-6)
    assert all(p.grad is not None for name in ("lora", "paca") for p in grafts[name].parameters())
