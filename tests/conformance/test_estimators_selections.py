"""What every registered estimator and selection must do, asked of the registry: a new one is tested without being named here."""

import pytest
import torch

import graftwork
import tiny
from adapter_support import on_base
from graftwork.data.collate import Collator
from graftwork.estimators.base import Estimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.registry import lookup, make_config, methods
from graftwork.selection.base import Selection
from graftwork.training import checkpoint as ckpt
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe

ESTIMATORS = [info.name for info in methods("estimator")]
SELECTIONS = [info.name for info in methods("selection")]
#: options that make a short run show something; kept only where a method has them
SMALL = {"lr": 1e-2, "eps": 1e-2, "interval": 2, "layers": 1, "target_r": 1, "warmup": 1, "final": 1, "final_r": 4, "max_coordinates": 24,
         "grasp_samples": 2}

#: rates at which 25 steps of an estimator without optimizer show something; 3e-4 where not named
RATES = {"zo_sgd_sign": 1e-3}
#: estimators whose gradient is zero but for a few entries: three short steps need not reach every tensor
SPARSE = {"deepzero"}
#: runs in `make test-fast`
QUICK = {"backprop", "mezo", "zo_sgd", None, "lisa", "adalora", "sora"}


def marked(*names):
    """The parameters of a test, slow unless all its names are quick."""
    return pytest.param(*names, marks=[] if QUICK.issuperset(names) else [pytest.mark.slow])


def together(estimator, selection):
    """Recipes refuse a selection that reads gradients beside an estimator that makes none, and an estimator and a selection that
    act on different adapters."""
    making, choosing = lookup("estimator", estimator).traits, lookup("selection", selection).traits
    if not making["gradients"] and choosing["reads_gradients"]:
        return False
    wanted = making.get("adapters", []), choosing["adapters"]
    return not all(wanted) or bool(set(wanted[0]) & set(wanted[1]))


def small(axis, name):
    known = lookup(axis, name).config.model_fields
    return make_config(axis, name, **{k: v for k, v in SMALL.items() if k in known})


def batch_of(seed=0, rows=2):
    ids = tiny.tokens(rows, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def built(estimator="backprop", selection=None, *, full=False):
    model, grafts = tiny.llama(), []
    if full or (selection and lookup("selection", selection).traits["full_tuning_only"]):
        model.requires_grad_(True)
        parameters = list(model.named_parameters())
    else:
        wanted = lookup("selection", selection).traits["adapters"] if selection else []
        adapter = wanted[0] if wanted else "lora"
        fields = make_config("adapter", adapter).model_dump()
        model = on_base(model, adapter)
        grafts = [graftwork.attach(model, adapter, **{k: v for k, v in {"r": 2, "dropout": 0.2}.items() if k in fields})]
        parameters = list(grafts[0].named_parameters())
    optimizer = None
    if lookup("estimator", estimator).traits["gradients"]:
        groups = [{k: v for k, v in g.items() if k != "names"} for graft in grafts for g in graft.parameter_groups()]
        optimizer = graftwork.optimizer("adamw", groups or model, lr=1e-2)
    made = [lookup("selection", selection).cls(small("selection", selection))] if selection else []
    model.train()
    estimating = lookup("estimator", estimator).cls(small("estimator", estimator))
    return TrainStep(model, CausalLMObjective(), estimating, parameters, grafts, made, optimizer, 1.0, (), 6, 3)


def trained(step, first, last):
    for at in range(first, last):
        result = step.run([batch_of(at), batch_of(at + 50, 3)], at)
        assert torch.isfinite(result.loss) and result.loss.dim() == 0 and not result.loss.requires_grad
        assert len(result.rows) == 2 and [r[0].shape[0] for r in result.rows] == [2, 3]
        assert all(v.dim() == 0 and not v.requires_grad for v in result.metrics.values())
    return {n: p.detach().clone() for n, p in step.parameters}


def test_every_name_is_collected_and_documented():
    assert {"backprop", "mezo"} <= set(ESTIMATORS) and "lisa" in SELECTIONS
    for axis, names, base in (("estimator", ESTIMATORS, Estimator), ("selection", SELECTIONS, Selection)):
        for name in names:
            info = lookup(axis, name)
            assert issubclass(info.cls, base) and info.cls.__module__.rpartition(".")[2] == name and info.config.__doc__
    assert set(lookup("selection", "lisa").traits) == {"reads_gradients", "full_tuning_only", "events_only", "adapters"}


@pytest.mark.parametrize("name", map(marked, ESTIMATORS))
def test_an_estimator_steps_moves_only_what_is_trained_and_repeats_itself(name):
    step = built(name)
    own = {id(p) for _, p in step.parameters}
    start = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    state = torch.get_rng_state()
    after = trained(step, 0, 3)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is nobody's business
    for n, p in step.model.named_parameters():
        if not (name in SPARSE and id(p) in own):
            assert torch.equal(p, start[n]) == (id(p) not in own), n
    assert any(not torch.equal(p, start[n]) for n, p in step.model.named_parameters())
    assert step.model.training
    again = trained(built(name), 0, 3)
    assert all(torch.equal(after[n], again[n]) for n in after)
    assert lookup("estimator", name).traits["gradients"] == (step.optimizer is not None)


@pytest.mark.parametrize("name", map(marked, ESTIMATORS))
def test_an_estimator_lets_the_loss_fall(name):
    step = built(name, full=True)
    if step.optimizer is None:
        step.estimator.config = step.estimator.config.model_copy(update={"lr": RATES.get(name, 3e-4), "eps": 1e-3})
    losses = [float(step.run([batch_of()], at).loss) for at in range(25)]
    assert losses[-1] < losses[0] - 0.05


def state_of_run(step):
    """What a checkpoint holds, through JSON and tensors."""
    import json

    from graftwork.optim import optimizer_state_tensors

    tensors = {}
    plain = json.loads(json.dumps({"estimator": ckpt.split(step.estimator.state_dict(), "e", tensors),
                                   "selections": [[s.structure(), ckpt.split(s.state_dict(), f"s{i}", tensors)]
                                                  for i, s in enumerate(step.selections)]}))
    optimizer = ({}, None)
    if step.optimizer is not None:
        optimizer = optimizer_state_tensors(step.optimizer, {p: n for n, p in step.parameters})
    learned = {n: t.clone() for n, t in ckpt.learned_tensors(step.model, step.parameters, step.grafts).items()}
    moments = {k: t.clone() for k, t in optimizer[0].items()}
    return plain, {k: t.clone() for k, t in tensors.items()}, (moments, optimizer[1]), learned


def restore(step, saved):
    from graftwork.optim import load_optimizer_state

    plain, tensors, (moments, header), learned = saved
    for selection, (structure, _) in zip(step.selections, plain["selections"]):
        selection.restore_structure(structure, step.model, step.grafts[0] if step.grafts else None)
    with torch.no_grad():
        for n, t in ckpt.learned_tensors(step.model, step.parameters, step.grafts).items():
            t.copy_(learned[n])
    if step.optimizer is not None:
        load_optimizer_state(step.optimizer, moments, header, {p: n for n, p in step.parameters})
    step.estimator.load_state_dict(ckpt.join(plain["estimator"], tensors))
    for selection, (_, state) in zip(step.selections, plain["selections"]):
        selection.load_state_dict(ckpt.join(state, tensors))


def pairs():
    """Every estimator and every selection alone; of pairs of two slow ones a quarter in every run (states do not depend on each other)."""
    for i, estimator in enumerate(ESTIMATORS):
        for j, selection in enumerate([None, *SELECTIONS]):
            if selection is None or together(estimator, selection):
                rare = not QUICK & {estimator, selection} and (i + j) % 4
                yield pytest.param(estimator, selection, marks=pytest.mark.full) if rare else marked(estimator, selection)


@pytest.mark.parametrize("estimator, selection", pairs())
def test_state_round_trips_at_any_step(estimator, selection):
    whole = built(estimator, selection)
    trained(whole, 0, 3)
    saved = state_of_run(whole)
    expected = trained(whole, 3, 6)
    again = built(estimator, selection)
    restore(again, saved)
    got = trained(again, 3, 6)
    assert all(torch.equal(expected[n], got[n]) for n in expected)


@pytest.mark.parametrize("name", map(marked, SELECTIONS))
def test_a_selection_leaves_the_global_generator_alone_and_some_parameters_in_place(name):
    step, state = built(selection=name), torch.get_rng_state()
    trained(step, 0, 4)
    assert torch.equal(torch.get_rng_state(), state)
    info = lookup("selection", name)
    if info.traits["events_only"]:
        assert hasattr(info.cls(small("selection", name)).as_callback(step.model), "on_step_begin")


@pytest.mark.parametrize("estimator, selection", [("mezo", None), ("backprop", "lisa")])
def test_the_planner_runs_the_same_step_on_fake_tensors(estimator, selection, tmp_path):
    """A plan needs no values: whatever reads one on the way raises under fake tensors."""
    sections = {"estimator": {"method": estimator, **small("estimator", estimator).model_dump()}}
    if not lookup("estimator", estimator).traits["gradients"]:
        sections["optimizer"] = None
    if selection:
        sections.update(selection=[{"method": selection, **small("selection", selection).model_dump()}], adapter=None)
    document = recipe(folder(tmp_path), completions(tmp_path / "d.jsonl"), tmp_path / "o", **sections)
    made = graftwork.plan(document, estimate_time=False)
    weights = sum(p.numel() * 4 for p in tiny.llama().parameters())
    assert made.categories["weights"] >= weights and not made.notes
    assert (made.categories["optimizer_state"] == 0) == (estimator == "mezo")
    if selection:  # Adam's two moments of one of two layers, and of what always trains
        model = tiny.llama()
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        rest = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
        state = 8 * (layer + rest)
        assert state <= made.categories["optimizer_state"] < state + 1024
