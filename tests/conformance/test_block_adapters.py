"""What every adapter of a feed-forward net must do, on every kind of model. Parametrised over the registry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import graftwork
import tiny
from adapter_support import BLOCK, attach, close, fill, output
from graftwork.adapters.block_scope import BlockAdapter
from graftwork.modeling.state import state_of
from graftwork.registry import lookup, make_config, methods
from graftwork.storage.base import apply_storage

IDS = tiny.tokens(2, 7)
STORAGES = [info.name for info in methods("storage")]


def nets(graft):
    return [a for a in graft.adapters.values() if isinstance(a, BlockAdapter)]


@pytest.mark.parametrize("kind", tiny.ALL)
@pytest.mark.parametrize("method", BLOCK)
def test_start_gradients_and_detach(method, kind):
    model = tiny.ALL[kind]()
    state, classes = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    before = output(model, IDS)
    graft = attach(model, method, filled=False)
    if lookup("adapter", method).traits["starts_at_identity"]:
        close(output(model, IDS), before, 1e-5)
    for adapter in nets(graft):
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
    fill(graft)
    kept = {k for k in model.state_dict() if ".graft." not in k}
    assert kept == state.keys(), "attaching renamed keys of the base"
    own, rng = {id(p) for p in graft.parameters()}, torch.get_rng_state()
    learned = output(model, IDS)
    assert (learned - before).abs().max() > 1e-2
    learned.square().sum().backward()
    assert torch.equal(rng, torch.get_rng_state()), "the global random state moved"
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own) or (kind == "mixtral" and id(parameter) in own), name
    with graft.disabled():
        close(output(model, IDS), before, 1e-6)
    graft.detach()
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)
    assert [type(m) for m in model.modules()] == classes
    close(output(model, IDS), before, 1e-6 if kind == "mixtral" else 0.0)


@pytest.mark.parametrize("method", BLOCK)
def test_same_seed_same_start(method):
    def start(seed):
        return [p.detach().clone() for _, p in attach(tiny.llama(), method, seed=seed, filled=False).named_parameters()]

    assert all(torch.equal(a, b) for a, b in zip(start(5), start(5), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start(5), start(6), strict=True))


@pytest.mark.parametrize("method", BLOCK)
def test_groups_and_refusals(method, tmp_path):
    graft = attach(tiny.llama(), method)
    groups = graft.parameter_groups()
    assert sorted(n for g in groups for n in g["names"]) == sorted(n for n, _ in graft.named_parameters())
    for call, words in ((graft.merge, "cannot be merged"), (graft.delta_weights, "depends on the input"),
                        (lambda: graft.to_lora(rank=4), "depends on the input"), (lambda: graft.scale(0.5), "no scale")):
        with pytest.raises(graftwork.GraftworkError, match=words):
            call()
    with pytest.raises(graftwork.GraftworkError, match="initializer"):
        graftwork.attach(tiny.llama(), method, initializer="pissa")


@pytest.mark.parametrize("kind", tiny.ALL)
@pytest.mark.parametrize("method", BLOCK)
@torch.no_grad()
def test_mixed_rows_are_the_rows_alone(method, kind):
    model, ids = tiny.ALL[kind](), tiny.tokens(6, 6)
    grafts = {"a": attach(model, method), "b": attach(model, method, name="b", seed=4, r=1),
              "l": attach(model, "lora", name="l", seed=9), "d": attach(model, "dora", name="d", seed=2)}
    rows = ["b", None, "a", "l", "a", "d"]
    with graftwork.routing(model, rows):
        mixed = output(model, ids)
    with graftwork.routing(model, rows[::-1], expansion=2):
        beams = output(model, ids.flip(0).repeat_interleave(2, 0))
    for i, name in enumerate(rows):
        with state_of(model).scope(disabled=frozenset(grafts) - {name}):
            alone = output(model, ids)[i]
        close(mixed[i], alone)
        close(beams[-2 * i - 1], alone)
        if name is not None:
            with state_of(model).scope(disabled=frozenset(grafts)):
                assert (output(model, ids)[i] - alone).abs().max() > 1e-2


@pytest.mark.parametrize("method", BLOCK)
@torch.no_grad()
def test_grafts_come_and_go_beside_each_other(method):
    model = tiny.llama()
    state, classes = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    first, lora = attach(model, method), attach(model, "lora", name="l")
    second = attach(model, method, name="b", seed=3)
    with pytest.raises(graftwork.GraftworkError, match="name one per row"):
        output(model, IDS)
    with graftwork.routing(model, ["b", "l"]):
        wanted = output(model, IDS)
    first.detach()
    with graftwork.routing(model, ["b", "l"]):
        assert torch.equal(output(model, IDS), wanted)
    lora.detach()
    close(output(model, IDS)[0], wanted[0])
    second.detach()
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == list(state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("method", BLOCK)
def test_checkpointed_gradients_are_equal(method, kind):
    model = tiny.CAUSAL[kind]()
    grafts = [attach(model, method, dropout=0.3), attach(model, "lora", name="b", dropout=0.2)]
    model.train()
    state = state_of(model)

    def gradients(rows):
        model.zero_grad()
        with state.scope(step=3), graftwork.routing(model, rows):
            loss = output(model, IDS).square().mean()
            extra = [t for a in grafts[0].adapters.values() if (t := a.auxiliary_loss()) is not None]
            (loss + sum(extra)).backward()
        assert not [t for a in grafts[0].adapters.values() if (t := a.auxiliary_loss()) is not None], "counted once"
        return [p.grad.clone() for g in grafts for p in g.parameters() if p.grad is not None]

    plain = gradients(["a", "b"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state.checkpoint_kwargs())
    again = gradients(["a", "b"])
    assert len(plain) == len(again) and all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("method", BLOCK)
def test_dropout_follows_the_clock(method):
    model = tiny.llama()
    attach(model, method, dropout=0.5)
    plain, state = output(model, IDS), state_of(model)
    model.train()
    with state.scope(step=1):
        one = output(model, IDS)
        assert torch.equal(output(model, IDS), one)
    with state.scope(step=2):
        two = output(model, IDS)
    assert not torch.allclose(one, two) and not torch.allclose(one, plain)
    with torch.no_grad():
        assert torch.equal(output(model, IDS), plain), "no dropout without gradients"


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.ALL)
@pytest.mark.parametrize("method", BLOCK)
def test_a_step_on_fake_tensors(method, kind):
    with FakeTensorMode():
        model = tiny.ALL[kind]()
        grafts = [attach(model, method), attach(model, method, name="b")]
        model.train()
        ids = torch.ones(3, 7, dtype=torch.int64)
        for rows in (["a"] * 3, ["a", "b", "b"]):
            with graftwork.routing(model, rows):
                output(model, ids).square().mean().backward()
        assert all(p.grad.shape == p.shape for g in grafts for p in g.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, storage", [("llama", "nf4"), ("gpt2", "nf4"), ("qwen3", "dense"), ("mixtral", "dense"), ("mixtral", "nf4")])
@pytest.mark.parametrize("method", BLOCK)
def test_it_learns_on_a_stored_base(method, kind, storage, dtype):
    model = tiny.CAUSAL[kind](dtype=dtype)
    apply_storage(model, make_config("storage", storage))
    before = output(model, IDS)
    graft = attach(model, method, filled=False)
    close(output(model, IDS), before, 1e-5 if dtype == torch.float32 else 2e-2)
    model.train()
    optimizer, losses = torch.optim.Adam(graft.parameters(), lr=2e-2), []
    for _ in range(6):
        loss = F.cross_entropy(output(model, IDS)[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0], losses
    model.eval()
    graft.detach()
    close(output(model, IDS), before, (1e-5 if dtype == torch.float32 else 2e-2) if kind == "mixtral" else 0.0)
