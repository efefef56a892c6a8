"""LISA: what trains, what is dropped, how often each layer is drawn, and that all layers at once is full tuning."""

import pytest
import torch
from scipy import stats

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import UsageError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.modeling.state import state_of
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.optim import load_optimizer_state, optimizer_state_tensors
from graftwork.selection.lisa import LISA, LISASelection, decoder_blocks
from graftwork.training.step import TrainStep

LAYERS = 4


def batch_of(seed=0):
    ids = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def built(config=None, seed=0, optimizer="adamw", checkpointing=False, **options):
    model = tiny.llama(num_hidden_layers=LAYERS, **options).requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state_of(model).checkpoint_kwargs())
    model.train()
    made = graftwork.optimizer(optimizer, model, lr=1e-3)
    selections = [LISASelection(config)] if config else []
    estimator = BackpropEstimator(Backprop())
    named = list(model.named_parameters())
    return TrainStep(model, CausalLMObjective(), estimator, named, (), selections, made, 1.0, (), 100, seed)


def active_names(step, at, config):
    """Names that must train in optimizer step `at`, from the draw alone."""
    layers = LISASelection(config).active_layers(step.seed, at // config.interval, LAYERS)
    inside = {f"model.layers.{i}." for i in layers}
    return {n for n, _ in step.parameters
            if any(n.startswith(p) for p in inside) or (config.always_on and ".layers." not in n)}


@pytest.mark.parametrize("always_on", [True, False])
def test_gradients_updates_and_state_are_those_of_the_active_set(always_on):
    config = LISA(layers=2, interval=3, always_on=always_on)
    step = built(config)
    sets = []
    for at in range(9):
        expected = active_names(step, at, config)
        before = {n: p.detach().clone() for n, p in step.parameters}
        step.compute([batch_of(at)], at)
        assert {n for n, p in step.parameters if p.grad is not None} == expected
        step.optimizer.step()
        for _, p in step.parameters:
            p.grad = None
        step.finish(at)
        assert {n for n, p in step.parameters if not torch.equal(p, before[n])} == expected
        held = {n for n, p in step.parameters if step.optimizer.state.get(p)}
        assert held == expected  # also right after a switch, when the layers before must have lost theirs
        nbytes = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values())
        assert nbytes == sum(step.optimizer.state_bytes(p.shape, p.dtype) for n, p in step.parameters if n in expected)
        sets.append(frozenset(expected))
    assert len(set(sets)) > 1 and sets[0] == sets[1] == sets[2]


def test_bytes_do_not_grow_over_time():
    config = LISA(layers=1, interval=1)
    step, seen = built(config), set()
    for at in range(8):
        step.run([batch_of(at)], at)
        seen.add(sum(t.nbytes for state in step.optimizer.state.values() for t in state.values()))
    assert len(seen) == 1


def test_a_layer_drawn_again_starts_as_a_new_one():
    config = LISA(layers=1, interval=2, always_on=False)
    step = built(config)
    for at in range(12):
        step.run([batch_of(at)], at)
        counts = {int(state["step"]) for state in step.optimizer.state.values()}
        first = at - at % 2
        now, earlier = (LISASelection(config).active_layers(0, at // 2 - back, LAYERS) for back in (0, 1))
        if not at // 2 or now != earlier:
            assert counts == {at - first + 1}


@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_all_layers_at_a_time_is_full_tuning(optimizer):
    lisa, full = built(LISA(layers=LAYERS, interval=2), optimizer=optimizer), built(optimizer=optimizer)
    for at in range(5):
        a, b = lisa.run([batch_of(at)], at), full.run([batch_of(at)], at)
        assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(lisa.parameters, full.parameters))


def test_each_layer_is_drawn_equally_often():
    selection, layers, draws = LISASelection(LISA(layers=2)), 8, 4000
    counts, pairs = [0] * layers, {}
    for interval in range(draws):
        drawn = selection.active_layers(11, interval, layers)
        assert len(set(drawn)) == 2 and drawn == sorted(drawn)
        for layer in drawn:
            counts[layer] += 1
        pairs[tuple(drawn)] = pairs.get(tuple(drawn), 0) + 1
    assert stats.chisquare(counts).pvalue > 1e-3
    assert len(pairs) == 28 and stats.chisquare(list(pairs.values())).pvalue > 1e-3
    assert selection.active_layers(11, 5, layers) == selection.active_layers(11, 5, layers)
    assert [selection.active_layers(1, k, layers) for k in range(9)] != [selection.active_layers(2, k, layers) for k in range(9)]


def test_checkpointing_with_frozen_embeddings_gives_the_same_gradients():
    config, grads = LISA(layers=1, interval=2, always_on=False), []
    for checkpointing in (False, True):
        step = built(config, checkpointing=checkpointing)
        step.compute([batch_of()], 0)
        grads.append({n: p.grad for n, p in step.parameters if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-7)
        assert float(grad.abs().max()) > 0


def test_resuming_inside_an_interval_continues_bit_for_bit():
    config = LISA(layers=1, interval=4)
    whole = built(config)
    for at in range(10):
        if at == 6:  # two steps into the second interval
            names = {p: n for n, p in whole.parameters}
            tensors, header = optimizer_state_tensors(whole.optimizer, names)
            kept = {n: p.detach().clone() for n, p in whole.parameters}
            tensors = {k: t.clone() for k, t in tensors.items()}
        whole.run([batch_of(at)], at)
    again = built(config)
    with torch.no_grad():
        for name, p in again.parameters:
            p.copy_(kept[name])
    load_optimizer_state(again.optimizer, tensors, header, {p: n for n, p in again.parameters})
    for at in range(6, 10):
        again.run([batch_of(at)], at)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(whole.parameters, again.parameters))


def test_too_many_layers_and_models_without_layers_are_refused():
    with pytest.raises(UsageError, match="layers = 9, but the model has 4"):
        built(LISA(layers=9)).compute([batch_of()], 0)
    with pytest.raises(UsageError, match="no list of layers"):
        decoder_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind, count", [("llama", 2), ("gpt2", 2), ("qwen3", 2), ("mixtral", 2), ("bert", 2)])
def test_blocks_of_each_architecture(kind, count):
    blocks = decoder_blocks(getattr(tiny, kind)())
    assert len(blocks) == count and len({type(b) for b in blocks}) == 1


def test_as_callback_in_a_foreign_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            ids = tiny.tokens(1, 6, i)[0]
            return {"input_ids": ids, "labels": ids}

    config = LISA(layers=1, interval=2, always_on=False)
    model = tiny.llama(num_hidden_layers=LAYERS)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_strategy="no", seed=3,
                             report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=1e-3)
    trainer = Trainer(model=model, args=args, train_dataset=Data())
    selection = LISASelection(config)
    trainer.add_callback(selection.as_callback(model))
    trainer.train()
    drawn = [set(selection.active_layers(3, k, LAYERS)) for k in (0, 1)]
    moved = {int(n.split(".")[2]) for n, p in model.named_parameters() if ".layers." in n and not torch.equal(p, start[n])}
    assert moved == drawn[0] | drawn[1]
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters() if ".layers." not in n)
    held = {n for n, p in model.named_parameters() if trainer.optimizer.optimizer.state.get(p)}
    assert {int(n.split(".")[2]) for n in held} == drawn[1]


def test_a_selection_that_needs_gradients_of_sites_is_refused_as_a_callback():
    class Needy(LISASelection):
        events_only = False

    with pytest.raises(UsageError, match="foreign trainers"):
        Needy(LISA()).as_callback(tiny.llama())
