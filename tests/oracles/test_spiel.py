"""SpIEL: gradients gathered from the dense ones, masked training in the weight itself, drop and growth against a plain reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.spiel import SpIELAdapter
from graftwork.data.collate import Collator
from graftwork.errors import GraftworkError, UsageError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.spiel import SpIELGrowth, SpIELSelection
from graftwork.training.step import TrainStep

IDS = tiny.tokens(2, 7)


def test_positions_and_count():
    graft = graftwork.attach(tiny.llama(), "spiel", density=0.03)
    for adapter in graft.adapters.values():
        total, positions = adapter.out_features * adapter.in_features, adapter.positions.tolist()
        k = int(0.03 * total)
        assert len(positions) == k == adapter.values.numel() and adapter.positions.dtype == torch.int32
        assert all(i * total // k <= p < (i + 1) * total // k for i, p in enumerate(positions)), "one in each stretch"
    huge = SimpleNamespace(name="huge", in_features=2**16, out_features=2**15, layer=0, role="up")
    config = graft.config.model_copy(update={"density": 1e-9})
    with pytest.raises(UsageError, match="huge.*int32"):
        SpIELAdapter(huge, config, shared=None, generator=torch.Generator())
    assert SpIELAdapter.parameter_count(huge, config) == 2 and SpIELAdapter.parameter_count(
        SimpleNamespace(in_features=3, out_features=3), config) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_is_the_dense_one_at_the_positions(kind):
    model = tiny.ALL[kind]()
    graft = attach(model, "spiel")
    dense = tiny.ALL[kind]().requires_grad_(True)
    with torch.no_grad():
        for name, change in graft.delta_weights().items():
            dense.get_submodule(name).weight += change.T if kind == "gpt2" else change
    ours, theirs = output(model, IDS), output(dense, IDS)
    close(ours, theirs, 1e-5)
    seen = {}
    for name, adapter in graft.adapters.items():
        adapter.watch = lambda G, name=name: seen.update({name: G})
    ours.square().mean().backward()
    theirs.square().mean().backward()
    alone = {n: a.values.grad.clone() for n, a in graft.adapters.items()}
    graftwork.attach(model, "spiel", name="b", density=0.01)
    model.zero_grad()
    with graftwork.routing(model, ["a", "a"]):
        output(model, IDS).square().mean().backward()
    for name, adapter in graft.adapters.items():
        close(adapter.values.grad, alone[name], 1e-4)
        full = dense.get_submodule(name).weight.grad
        full = full.T if kind == "gpt2" else full
        close(adapter.values.grad, full.flatten()[adapter.positions.long()], 1e-3)
        close(seen[name], full, 1e-3)


def test_fixed_positions_are_masked_training_of_the_weight():
    """20 Adam steps in float64 on W itself with the gradient masked: same trajectory."""
    model = tiny.llama().double()
    graft = graftwork.attach(model, "spiel", density=0.05, target_modules=["q_proj", "down_proj"])
    by_hand = tiny.llama().double().requires_grad_(False)
    masks = {}
    for name, adapter in graft.adapters.items():
        adapter.double()
        weight = by_hand.get_submodule(name).weight.requires_grad_(True)
        masks[name] = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, adapter.positions.long(), True).view_as(weight)
    ours = torch.optim.Adam(graft.parameters(), lr=1e-3)
    theirs = torch.optim.Adam([by_hand.get_submodule(n).weight for n in masks], lr=1e-3)
    for _ in range(20):
        ours.zero_grad()
        theirs.zero_grad()
        output(model, IDS).square().mean().backward()
        output(by_hand, IDS).square().mean().backward()
        for name, mask in masks.items():
            by_hand.get_submodule(name).weight.grad.mul_(mask)
        ours.step()
        theirs.step()
    pristine = tiny.llama().double()
    for name, change in ((n, a.delta_weight(None).double()) for n, a in graft.adapters.items()):
        moved = by_hand.get_submodule(name).weight - pristine.get_submodule(name).weight
        assert (moved - change).abs().max() < 1e-6 and moved.abs().max() > 1e-3  # delta_weight answers in fp32


def test_nothing_dense_is_kept_for_the_backward_pass():
    graft = fill(graftwork.attach(tiny.llama(), "spiel", density=0.02, target_modules=["layers.0.mlp.down_proj"]))
    (adapter,), module = graft.adapters.values(), graft.model.model.layers[0].mlp.down_proj
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 7, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x * 1.0)
    own = {t.untyped_storage().data_ptr() for t in (*adapter.parameters(), module.weight)}
    assert sum(n for p, n in kept.items() if p not in own) == 14 * 96 * 4, "x alone"


# -- drop and growth ----------------------------------------------------------------------------------------------------
def batch_of(seed):
    ids = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": row} for row in ids])


def built(selection, *, density=0.02, steps=100, lr=1e-2, optimizer="adamw"):
    model = tiny.llama()
    graft = graftwork.attach(model, "spiel", density=density, target_modules=["q_proj", "down_proj"])
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    made = graftwork.optimizer(optimizer, groups, lr=lr) if isinstance(optimizer, str) else optimizer(groups)
    return graft, TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(graft.named_parameters()), [graft],
                            [selection] if selection else [], made, 0.0, (), steps, 0)


def reference(positions, values, candidates, sums, n):
    """One event in plain Python: (new positions, values) as {position: value}, dropped and grown."""
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))[:n]
    dropped = {positions[i] for i in order}
    active = set(positions) - dropped
    ranked = sorted(((abs(s), c) for c, s in zip(candidates, sums) if c not in active), reverse=True)[:n]
    grown = {c for _, c in ranked}
    free, new = [positions[i] for i in order if positions[i] not in grown], [c for _, c in ranked if c not in dropped]
    out = set(free[: len(new)])
    result = {p: v for p, v in zip(positions, values) if p not in out}
    result.update({p: 0.0 for p in new})
    return result, out, set(new)


@pytest.mark.parametrize("first", [1.0, 0.3])
def test_an_event_is_the_reference(first):
    """Watched gradients are those of the dense weight in the phase's steps; positions, values and moments follow."""
    selection = SpIELSelection(SpIELGrowth(interval=4, phase=2, first_share=first))
    graft, step = built(selection)
    dense = {n: [] for n in graft.adapters}
    for at in range(3):
        step.run([batch_of(at), batch_of(at + 50)], at)
        assert not selection._seen or at >= 2
    assert all(s["steps"] == 1 for s in selection._seen.values()) and set(selection._seen) == set(graft.adapters)
    # the same gradients by another way: watch the last step's passes ourselves
    before_step = selection.before_step

    def spying(ctx):
        before_step(ctx)
        for name, adapter in graft.adapters.items():
            inner = adapter.watch
            adapter.watch = lambda G, name=name, inner=inner: (dense[name].append(G.clone()), inner(G))

    selection.before_step = spying
    held = {n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for n, s in selection._seen.items()}
    result = step.compute([batch_of(3), batch_of(53)], 3)
    assert torch.isfinite(result.loss)
    step.optimizer.step()
    was = {n: (a.positions.tolist(), a.values.tolist(), a.delta_weight(None)) for n, a in graft.adapters.items()}
    moments = {n: {k: step.optimizer.state[a.values][k].clone() for k in ("exp_avg", "exp_avg_sq")}
               for n, a in graft.adapters.items()}
    step.finish(3)
    for name, adapter in graft.adapters.items():
        positions, values, change = was[name]
        k, candidates = len(positions), held[name]["candidates"]
        last = sum(dense[name]).flatten()[candidates]
        sums, squares = held[name]["sum"] + last, held[name]["squares"] + last**2
        assert len(dense[name]) == 2
        wanted, out, new = reference(positions, values, candidates.tolist(), sums.tolist(), int(first * k))
        now = dict(zip(adapter.positions.tolist(), adapter.values.tolist()))
        assert len(now) == k, "k positions, none twice"
        assert now == wanted and new and len(new) == len(out)
        gone = (change - adapter.delta_weight(None)).flatten().nonzero().flatten().tolist()
        assert set(gone) <= out, "nothing but the dropped changes moved"
        state, at = step.optimizer.state[adapter.values], {p: i for i, p in enumerate(adapter.positions.tolist())}
        index = {c: i for i, c in enumerate(candidates.tolist())}
        for p in new:
            assert state["exp_avg"][at[p]].item() == pytest.approx(sums[index[p]].item() / 2 * (1 - 0.9**4), rel=1e-4)
            assert state["exp_avg_sq"][at[p]].item() == pytest.approx(squares[index[p]].item() / 2 * (1 - 0.999**4), rel=1e-3)
        for p in set(positions) - out:
            assert state["exp_avg"][at[p]] == moments[name]["exp_avg"][positions.index(p)]
    assert not selection._seen


def test_shares_fall_and_the_last_step_keeps_what_was_learned():
    selection = SpIELSelection(SpIELGrowth(interval=10, share=0.4))
    shares = {t: selection.share_at(t, 40) for t in range(40) if selection.share_at(t, 40)}
    assert shares == pytest.approx({9: 1.0, 19: 0.2, 29: 0.1})
    assert selection.share_at(39, 40) == 0.0
    for late in (0.0, 0.5):
        graft, step = built(SpIELSelection(SpIELGrowth(interval=2, first_share=0.0, share=late)), steps=5)
        start = {n: a.positions.clone() for n, a in graft.adapters.items()}
        for at in range(5):
            step.run([batch_of(at)], at)
        assert all(torch.equal(a.positions, start[n]) == (late == 0.0) for n, a in graft.adapters.items())


@pytest.mark.slow
def test_growth_beats_fixed_positions_at_equal_k():
    def final(selection):
        graft, step = built(selection, density=0.01, steps=40)
        losses = [float(step.run([batch_of(0)], at).loss) for at in range(40)]
        assert all(a.values.numel() == int(0.01 * a.out_features * a.in_features) for a in graft.adapters.values())
        return losses[0], losses[-1]

    start, fixed = final(None)
    _, grown = final(SpIELSelection(SpIELGrowth(interval=5, phase=2)))
    assert start - grown > 1.3 * (start - fixed), (start, fixed, grown)


def test_a_foreign_optimizer_and_plain_state():
    graft, step = built(SpIELSelection(SpIELGrowth(interval=2)), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1,
                                                                                                          momentum=0.9))
    start = {n: a.positions.clone() for n, a in graft.adapters.items()}
    for at in range(2):
        step.run([batch_of(at)], at)
    for name, adapter in graft.adapters.items():
        new = torch.isin(adapter.positions, start[name], invert=True)
        momentum = step.optimizer.state[adapter.values]["momentum_buffer"]
        assert new.any() and not momentum[new].any() and not adapter.values.detach()[new].any()


@pytest.mark.slow
def test_a_killed_run_resumes_identically(tmp_path, monkeypatch):
    """After three steps positions have moved once and the next candidates are being watched."""
    from safetensors.torch import load_file

    import training_support as support
    from graftwork.training.trainer import GraftTrainer

    model, file = support.folder(tmp_path), support.completions(tmp_path / "rows.jsonl")

    def document(out):
        return support.recipe(model, file, tmp_path / out, adapter={"method": "spiel", "density": 0.05},
                              selection=[{"method": "spiel", "interval": 2, "phase": 2, "share": 0.5}],
                              train={"max_steps": 6, "save_steps": 1})

    whole = support.run(document("whole"))
    plain = GraftTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyError("killed")
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(GraftTrainer, "training_step", dies)
        support.run(document("half"))
    again = support.run(document("half"), resume=True)
    one, other = (load_file(f"{run.graft}/graft.safetensors") for run in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    fresh = graftwork.attach(tiny.llama(), "spiel", density=0.05, seed=whole.grafts[0].seed)
    assert any(not torch.equal(a.positions, one[f"{n}.positions"]) for n, a in fresh.adapters.items())


@pytest.mark.slow
def test_the_best_checkpoint_has_its_own_positions(tmp_path):
    import training_support as support

    model, file = support.folder(tmp_path), support.completions(tmp_path / "rows.jsonl")
    made = support.run(support.recipe(
        model, file, tmp_path / "o", adapter={"method": "spiel", "density": 0.05},
        selection=[{"method": "spiel", "interval": 3, "phase": 2}], optimizer={"method": "adamw", "lr": 0.3},
        data={"eval": str(file)}, train={"max_steps": 6, "eval_steps": 1, "restore_best": True}))
    from graftwork.training import checkpoint as ckpt

    best = ckpt.read(tmp_path / "o" / "checkpoints" / "best", "learned")
    for name, adapter in made.grafts[0].adapters.items():
        (key,) = [k for k in best if k.startswith("moved:") and k.endswith(f"/{name}.positions")]
        assert torch.equal(adapter.positions, best[key])


@pytest.mark.slow
def test_it_is_planned_and_refused(tmp_path):
    import training_support as support

    model, file = support.folder(tmp_path), support.completions(tmp_path / "rows.jsonl")
    document = support.recipe(model, file, tmp_path / "o", adapter={"method": "spiel", "density": 0.05},
                              selection=[{"method": "spiel", "interval": 1}])
    assert not graftwork.plan(document, estimate_time=False).notes
    with pytest.raises(GraftworkError, match="acts on adapter spiel"):
        support.run({**document, "adapter": {"method": "lora", "r": 2}})
    graft, step = built(SpIELSelection())
    graftwork.attach(graft.model, "spiel", name="other")
    with pytest.raises(UsageError, match="one graft at a time"):
        step.run([batch_of(0)], 0)
    with pytest.raises(UsageError, match="fused"):
        support.run({**document, "optimizer": {"method": "adamw", "fused": True}})
