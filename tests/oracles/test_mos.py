"""MoS: LoRA in its corner, the pools of the paper in fp64 with their gradients, and the draws."""

from __future__ import annotations

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters import mos
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)


def test_all_private_is_lora_bit_for_bit():
    """p = e = r, l = 1: start, outputs, gradients and steps of a LoRA of the same seed."""
    ours, theirs = tiny.llama(), tiny.llama()
    mine = graftwork.attach(ours, "mos", r=4, equivalent_rank=4, private_rank=4, shards=1, alpha=6.0, seed=8)
    lora = graftwork.attach(theirs, "lora", r=4, alpha=6.0, seed=8)
    for name, adapter in mine.adapters.items():
        assert adapter.public_A is None and adapter.index_A is None
        assert torch.equal(adapter.private_A, lora.adapters[name].lora_A)
    steps = [torch.optim.SGD(g.parameters(), lr=0.05) for g in (mine, lora)]
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), steps):
            optimizer.zero_grad()
            output(model, IDS).square().mean().backward()
            optimizer.step()
    for name, adapter in mine.adapters.items():
        close(adapter.private_A, lora.adapters[name].lora_A, 1e-6)
        close(adapter.private_B, lora.adapters[name].lora_B.T, 1e-6)
        B, A = lora.adapters[name].factors()
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors(), (adapter.private_B.T * 1.5, adapter.private_A)))
        close(adapter.factors()[0] @ adapter.factors()[1], B @ A, 1e-5)
    close(output(ours, IDS), output(theirs, IDS), 1e-6)


def paper_pools(graft, names, e, p, shards):
    """The pools and the index vectors as the paper has them: all public rows first, then p l private rows a site."""
    pools, index = {}, {}
    for letter in "AB":
        adapters = [graft.adapters[n] for n in names]
        pools[letter] = torch.cat([getattr(a, f"public_{letter}") for a in adapters]
                                  + [getattr(a, f"private_{letter}") for a in adapters]).detach().double().requires_grad_()
        first = (e - p) * len(names) * shards
        for i, a in enumerate(adapters):
            private = [first + i * p * shards + t for t in range(p * shards)]
            index[letter, names[i]] = getattr(a, f"index_{letter}").tolist() + private
    return pools, index


@pytest.mark.parametrize("r, e, p, shards", [(3, 3, 1, 2), (3, 2, 1, 4), (5, 4, 2, 1)])
def test_the_pools_of_the_paper(r, e, p, shards):
    """Values of all sites of a kind and gradients of the whole pool, a shard's being the sum over its uses."""
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "mos", r=r, equivalent_rank=e, private_rank=p, shards=shards, alpha=4.0, seed=2,
                                  target_modules=["down_proj"]))
    names = list(graft.adapters)
    assert graft.parameter_count() == e * len(names) * (tiny.FFN + tiny.HIDDEN)
    pools, index = paper_pools(graft, names, e, p, shards)
    assert pools["A"].shape == (e * 2 * shards, tiny.FFN // shards) and pools["B"].shape == (e * 2 * shards, tiny.HIDDEN // shards)
    generator, loss, wanted = torch.Generator().manual_seed(0), 0.0, 0.0
    for name in names:
        A, B = (torch.stack([torch.cat([pools[c][k] for k in index[c, name][t * shards: (t + 1) * shards]]) for t in range(r)])
                for c in "AB")
        change = 4.0 / r * B.T @ A
        close(graft.adapters[name].delta_weight(None), change, 1e-5)
        G = torch.randn(change.shape, generator=generator)
        loss = loss + (graft.adapters[name].delta_weight(None) * G).sum()
        wanted = wanted + (change * G).sum()
    loss.backward()
    wanted.backward()
    for letter, pool in pools.items():
        got = torch.cat([getattr(graft.adapters[n], f"public_{letter}").grad for n in names]
                        + [getattr(graft.adapters[n], f"private_{letter}").grad for n in names])
        close(got, pool.grad, 1e-5)


def test_private_shards_are_touched_by_one_site_only():
    graft = attach(tiny.llama(), "mos", target_modules=["q_proj"])
    first, second = graft.adapters.values()
    first.delta_weight(None).square().sum().backward()
    assert first.private_A.grad.any() and second.private_A.grad is None and second.private_B.grad is None
    assert second.public_A.grad.any(), "the draw of the first site has rows of the second's piece"


def test_draws_are_distinct_and_dissociated():
    graft = attach(tiny.llama(), "mos")
    seen = set()
    for adapter in graft.adapters.values():
        A, B = adapter.index_A.tolist(), adapter.index_B.tolist()
        assert len(set(A)) == len(A) == (3 - 1) * 2 and max(A + B) < 2 * 2 * tiny.LAYERS
        seen |= {tuple(A), tuple(B)}
        assert adapter.index_A.dtype == torch.int32
    assert len(seen) > len(graft.adapters), "A and B, and the sites, draw separately"


def test_kinds_do_not_mix():
    """k and v have equal sizes and pools of their own; every change has the full rank r, over that of a LoRA of rank e."""
    graft = fill(graftwork.attach(tiny.llama(), "mos", r=3, equivalent_rank=2, private_rank=1, shards=2))
    assert sorted(k[0] for k in graft.shared.sites) == sorted(["q", "k", "v", "o", "gate", "up", "down"])
    assert all(torch.linalg.matrix_rank(c) == 3 for c in graft.delta_weights().values())
    before = graft.delta_weights()
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            if name.endswith("k_proj"):
                adapter.public_B.add_(1.0)
    changed = {n.split(".")[-1] for n, c in graft.delta_weights().items() if not torch.equal(c, before[n])}
    assert changed == {"k_proj"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pool_is_put_together_once_a_micro_batch(checkpointing, monkeypatch):
    """Gradients as of pools that every use makes for itself, two backward passes added, a piece written between uses included."""
    used, pool = {}, mos.Pools.pool

    def noted(*args):
        made = pool(*args)
        return used.setdefault(id(made), made)  # held, so that no other tensor gets its id

    monkeypatch.setattr(mos.Pools, "pool", noted)

    def gradients(kept):
        model = tiny.llama()
        graft = fill(attach(model, "mos"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=model.graft_state.checkpoint_kwargs())
            model.train()
        with model.graft_state.scope(kept=kept):
            for _ in range(2):
                output(model, IDS).square().mean().backward()
                with torch.no_grad():
                    next(iter(graft.adapters.values())).public_A.mul_(1.5)
        return [p.grad for p in graft.parameters() if p.requires_grad]

    together = gradients({})
    assert len(used) == 2 * 7 + 1  # factors of seven kinds, each for two sites and passes; one of them again, as a piece was written
    used.clear()
    for mine, alone in zip(together, gradients(None), strict=True):
        close(mine, alone, 1e-5)
    assert len(used) == (2 if checkpointing else 1) * 2 * 2 * 2 * 7  # one a use, of which there are more where blocks are repeated


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, ["a", "a"]])
def test_kept_factors_follow_a_shard_of_another_site(rows):
    """Factors and banks are kept without gradients; a written piece of another site's must not leave them stale."""
    model = tiny.llama()
    graft = attach(model, "mos", target_modules=["q_proj"])

    def run():
        if rows is None:
            return output(model, IDS)
        with graftwork.routing(model, rows):
            return output(model, IDS)

    first, second = graft.adapters.values()
    before, kept = run(), first.factors()
    assert first.factors()[0] is kept[0]
    for name in ("A", "B"):  # rows of the second piece, as the first site uses them
        getattr(second, f"public_{name}").add_(1.0)
    second_only = graft.delta_weights()
    assert not torch.equal(first.factors()[0], kept[0]) and not torch.allclose(run(), before)
    close(run(), dense(model, graft, second_only), 1e-5)


def dense(model, graft, changes):
    """Logits with the changes added to the weights by hand."""
    bare = tiny.llama()
    for name, change in changes.items():
        bare.get_submodule(name).weight += change
    return output(bare, IDS)


def test_saved_draws_win_over_the_seed(tmp_path):
    model = tiny.llama()
    graft = attach(model, "mos", target_modules=["q_proj"])
    for adapter in graft.adapters.values():
        adapter.index_A.data.copy_(torch.tensor([7, 0, 3, 5]))
    graft.save(tmp_path / "saved")
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "saved")
    assert all(a.index_A.tolist() == [7, 0, 3, 5] for a in loaded.adapters.values())
    assert torch.equal(output(again, IDS), output(model, IDS))


@pytest.mark.parametrize("options, message", [
    ({"r": 9, "equivalent_rank": 2, "private_rank": 1}, "2 sites of this kind share shards for rank 3"),
    ({"r": 4, "equivalent_rank": 2, "private_rank": 3}, "private_rank=3"),
    ({"r": 2, "shards": 7}, "shards=7 does not divide"),
    ({"r": 65, "equivalent_rank": 60}, "r=65"),
])
def test_budgets_that_do_not_fit(options, message):
    with pytest.raises(UsageError, match=message):
        graftwork.attach(tiny.llama(), "mos", target_modules=["q_proj"], **options)


def test_a_site_without_adapter_cannot_lend_its_shards():
    model = tiny.llama()
    graftwork.attach(model, "mos", r=2, target_modules=["q_proj"], ranks={"model.layers.1.self_attn.q_proj": 0})
    with pytest.raises(UsageError, match="no adapter"):
        output(model, IDS)
