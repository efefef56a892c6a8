"""The hybrid: its graph holds the first-order part only; each half equals backpropagation and MeZO on that half."""

import pytest
import torch

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.estimators.mezo import MeZO, MeZOEstimator, add_noise
from graftwork.estimators.zo_hybrid import ZOHybrid, ZOHybridEstimator, after
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.training.step import TrainStep

slow = pytest.mark.slow


def batch_of(rows=2, length=9, seed=3):
    ids = tiny.tokens(rows, length, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100] * (3 + i) + row[3 + i:]} for i, row in enumerate(ids)])


def built(model, estimator, named=None, grafts=(), lr=0.1):
    named = named or list(model.requires_grad_(True).named_parameters())
    optimizer = graftwork.optimizer("sgd", [p for _, p in named], lr=lr)
    return TrainStep(model, CausalLMObjective(), estimator, named, grafts, optimizer=optimizer, seed=4)


def hybrid(**options):
    return ZOHybridEstimator(ZOHybrid(**{"zeroth_lr": 1e-3, "eps": 1e-2, **options}))


@pytest.mark.parametrize("layers, expected", [(0, {"norm"}), (1, {"norm", "layers.1"}), (2, {"norm", "layers.1", "layers.0"})])
def test_the_last_layers_and_what_follows_them(layers, expected):
    model = tiny.llama()
    late = after(model, layers)
    names = {n.removeprefix("model.") for n, p in model.named_parameters() if id(p) in late}
    assert {".".join(n.split(".")[:2]) if n.startswith("layers") else n.split(".")[0] for n in names} == expected
    untied = tiny.llama(tied=False)
    assert id(untied.lm_head.weight) in after(untied, layers) and id(untied.model.embed_tokens.weight) not in after(untied, layers)


def saved_by(step):
    """(bytes, count) of what autograd keeps in one step."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t):
        step.run([batch_of()], 0)
    return sum(kept), len(kept)


@slow
@pytest.mark.parametrize("what", ["full", "lora"])
def test_the_graph_holds_nothing_of_the_layers_below(what):
    sizes, outputs = {}, []

    def note(module, args, output):
        if torch.is_grad_enabled():
            outputs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    for depth in (2, 4):
        for estimator in (hybrid(layers=1), BackpropEstimator(Backprop())):
            model = tiny.llama(num_hidden_layers=depth, tied=False)
            graft = graftwork.attach(model, "lora", r=2) if what == "lora" else None
            step = built(model, estimator, list(graft.named_parameters()) if graft else None, [graft] if graft else [])
            if isinstance(estimator, ZOHybridEstimator):
                for layer in model.model.layers:
                    layer.register_forward_hook(note)
            sizes[depth, estimator.method] = saved_by(step)
    assert outputs == [False, True, False, False, False, True]  # of the layers, in the pass with a graph
    assert sizes[2, "zo_hybrid"] == sizes[4, "zo_hybrid"]
    assert sizes[2, "zo_hybrid"][0] < sizes[2, "backprop"][0] < sizes[4, "backprop"][0]


@slow
def test_each_half_is_backpropagation_and_mezo_of_that_half():
    batches = [batch_of(), batch_of(3, seed=8)]
    model = tiny.llama()
    step = built(model, hybrid(n_samples=2, weight_decay=0.1))
    psi = step.estimator.first_order(model, step.parameters)
    before = {n: p.detach().clone() for n, p in step.parameters}
    result = step.run(batches, 0)
    other = tiny.llama()
    reference = built(other, BackpropEstimator(Backprop()))
    loss = reference.compute(batches, 0).loss
    grads = {n: p.grad for n, p in reference.parameters}
    probe = MeZOEstimator(MeZO(eps=1e-2, n_samples=2))
    phi = [(n, p) for n, p in other.named_parameters() if n not in psi]
    slopes = TrainStep(other, CausalLMObjective(), probe, phi, seed=4).run(batches, 0, lr=0.0).metrics
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-6) and psi and phi
    for n, p in step.parameters:
        if n in psi:
            expected = before[n] - 0.1 * grads[n]
        else:
            assert p.grad is None and p.requires_grad
            expected = before[n] * (1 - 1e-4 if p.dim() > 1 else 1)
            for q, key in enumerate(("projected_gradient", "projected_gradient_1")):
                assert float(slopes[key]) == pytest.approx(float(result.metrics[key]), rel=1e-4, abs=1e-4)
                z = torch.zeros_like(p)
                add_noise((4, 0, q), n, z, 1.0)
                expected = expected - 1e-3 * float(result.metrics[key]) * z / 2
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-4, atol=1e-5, msg=n)


@slow
def test_the_schedule_of_the_optimizer_is_that_of_both_parts_and_names_choose():
    moved = {}
    for factor in (1.0, 0.5):
        model = tiny.llama()
        step = built(model, hybrid(first_order=["mlp"]))
        for group in step.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        before = {n: p.detach().clone() for n, p in step.parameters}
        step.run([batch_of()], 0)
        moved[factor] = {n: p.detach() - before[n] for n, p in step.parameters}
    assert {n for n, _ in step.parameters if "mlp" in n} == step.estimator.first_order(model, step.parameters)
    for n, change in moved[1.0].items():
        torch.testing.assert_close(moved[0.5][n], change / 2, rtol=1e-2, atol=1e-6, msg=n)
        assert change.abs().max() > 0
    with pytest.raises(IncompatibleError, match="such a name"):
        built(tiny.llama(), hybrid(first_order=["nothing"])).run([batch_of()], 0)
    model = tiny.llama()
    early = [(n, p) for n, p in model.requires_grad_(True).named_parameters() if "layers.0" in n]
    with pytest.raises(IncompatibleError, match="last layers"):
        built(model, hybrid(), early).run([batch_of()], 0)


@slow
def test_a_recipe_plans_state_of_the_first_order_part_only_and_runs(tmp_path):
    from training_support import completions, folder, recipe, run

    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o", train={"max_steps": 2},
                      estimator={"method": "zo_hybrid", "layers": 1, "zeroth_lr": 1e-4, "eps": 1e-2})
    made = graftwork.plan(document, estimate_time=False)
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=4)
    late = after(model, 1)
    state = 8 * sum(p.numel() for p in graft.parameters() if id(p) in late)
    assert 0 < state <= made.categories["optimizer_state"] < state + 1024 and not made.notes
    assert run(document).steps == 2
