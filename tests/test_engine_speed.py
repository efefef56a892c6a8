"""What makes the engine's steps quick leaves their results alone, and does what it says."""

import pytest
import torch
from torch import nn

import graftwork
import tiny
from graftwork.adapters import row_groups
from graftwork.adapters.batched import Bank
from graftwork.adapters.row_groups import SETTLED
from graftwork.errors import UsageError
from graftwork.modeling.arithmetic import WideLinear
from graftwork.serving.engine import Engine, Limits, Request, Sampling
from graftwork.serving.engine.pool import LayerShape, Pool
from graftwork.serving.generate import generate
from test_generate import stir

RANKS = {"a": 4, "b": 2, "c": 1}


def adapted():
    model = tiny.llama()
    for name, rank in RANKS.items():
        stir(graftwork.attach(model, "lora", r=rank, alpha=2 * rank, name=name, target_modules="all-linear", seed=rank))
    return model


def ask(i, name, tokens=10):
    return Request(f"{i}", tiny.tokens(1, 3 + i, seed=i)[0].tolist(), name, Sampling(max_tokens=tokens, ignore_eos=True))


def same_alone(model, request):
    """Greedy tokens up to the first end, by Transformers' cache path; engines here go on behind it."""
    wanted = generate(model, tiny.tokenizer(), [request.prompt], adapters=[request.adapter], max_new_tokens=len(request.output))[0].ids
    assert wanted and tuple(request.output[: len(wanted)]) == wanted, request.id


@pytest.mark.parametrize("kernel", ["gathered", "looped"])
def test_rows_that_are_new_are_answered_without_a_bank(kernel, monkeypatch):
    """No bank before the same rows have come SETTLED times, one for each site then, and none at all where it would be read adapter by
    adapter; and what is said is what each says alone."""
    model, banks, direct = adapted(), [], []
    make, add = Bank.of.__func__, row_groups.Group.add_directly
    monkeypatch.setattr(Bank, "of", classmethod(lambda cls, *args, **options: (banks.append(1), make(cls, *args, **options))[1]))
    monkeypatch.setattr(row_groups.Group, "add_directly", lambda self, *args: (direct.append(1), add(self, *args))[1])
    monkeypatch.setattr(row_groups, "choose", lambda *args, **options: kernel)
    requests = [ask(i, name, SETTLED + 6) for i, name in enumerate(["a", "b", None, "c", "a"])]
    sites = 7 * tiny.LAYERS
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8) as engine:
        for request in requests:
            engine.add(request)
        for step in range(1, SETTLED + 2):
            engine.step()
            assert len(direct) == step * sites and not banks, step
        engine.step()
        looped = kernel == "looped"
        assert len(direct) == (SETTLED + 1 + looped) * sites and len(banks) == (0 if looped else sites)
        engine.run()
    monkeypatch.undo()
    for request in requests:
        same_alone(model, request)


def test_a_graft_with_a_bias_or_a_weight_is_answered_right():
    model = adapted()
    biased = stir(graftwork.attach(model, "lora", r=2, name="d", bias="lora_only"))
    assert all(adapter.own_factors() is None for adapter in biased.adapters.values())
    model.graft_state.grafts["b"].scale(0.5)
    requests = [ask(i, name, 3) for i, name in enumerate(["d", "b", "a", "d"])]
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, limits=Limits(chunk=2)) as engine:
        for request in requests:
            engine.add(request)
        engine.run()
    for request in requests:
        same_alone(model, request)


def test_sites_share_what_a_step_makes_of_its_rows(monkeypatch):
    """A step with prompts and single tokens makes as many indices for a model of many sites as for one site."""
    made, plain = [], row_groups.row_index
    monkeypatch.setattr(row_groups, "row_index", lambda *args: (made.append(1), plain(*args))[1])
    counts = []
    for targets in ("all-linear", ["layers.0.self_attn.q_proj"]):
        model = tiny.llama()
        for name in ("a", "b"):
            stir(graftwork.attach(model, "lora", r=2, name=name, target_modules=targets))
        with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8) as engine:
            for i, name in enumerate(["a", "b", "a"]):
                engine.add(ask(i, name))
                engine.step()
                engine.step()
            made.clear()
            engine.add(ask(3, None))
            engine.step()
            counts.append(len(made))
    assert counts[0] == counts[1] <= 4, counts


@pytest.mark.parametrize("grafted", [False, True], ids=["plain", "grafted"])
def test_a_packed_head_multiplies_as_the_head_does(grafted, monkeypatch):
    model, calls = tiny.llama(), []
    if grafted:
        stir(graftwork.attach(model, "lora", r=2, name="a", target_modules=["lm_head", "q_proj"]))
    name, head = "a" if grafted else None, model.get_output_embeddings()
    before = type(head)
    plain = nn.functional.linear
    with Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, packed_head=True) as engine:
        monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (calls.append(w is head.weight), plain(x, w, b))[1])
        requests = [ask(0, name), ask(1, None), ask(2, name)]
        for request in requests:
            engine.add(request)
        engine.run()
        assert calls and not any(calls), "the head was multiplied as it lies"
        monkeypatch.undo()
        packed = head.weight.graft_packed
        x = torch.randn(1, 5, head.in_features)
        with torch.no_grad():
            assert packed.serves(x, head.weight)
            torch.testing.assert_close(packed(x, None), nn.functional.linear(x, head.weight), rtol=1e-5, atol=1e-5)
            head.weight.mul_(1.0)
            assert not packed.serves(x, head.weight), "a weight that was written is not what was packed"
        assert not packed.serves(x, head.weight)
    assert type(head) is before and not isinstance(head, WideLinear) and not hasattr(head.weight, "graft_packed")
    for request in requests:
        same_alone(model, request)


def test_a_head_that_cannot_be_packed_is_refused():
    model = tiny.llama().double()
    before = model.config._attn_implementation
    with pytest.raises(UsageError, match="packed") as caught:
        Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, packed_head=True)
    assert caught.value.remedy and model.config._attn_implementation == before


@pytest.mark.parametrize("shapes", [[LayerShape(2, 8, 8)] * 2, [LayerShape(2, 8, 4), LayerShape(1, 16, 16)]], ids=["alike", "different"])
def test_views_of_cells_are_the_cells(shapes):
    pool = Pool(shapes, 6, page_tokens=8)
    pool.buffer.view(torch.float32).copy_(torch.arange(pool.buffer.numel() // 4))
    views = pool.views(slice(11, 30))
    lanes = [lane for pair in zip(pool.keys, pool.values) for lane in pair]
    for view, lane in zip(views, lanes, strict=True):
        assert torch.equal(view, lane[11:30].transpose(0, 1).unsqueeze(0)) and view.data_ptr() == lane[11:].data_ptr()
