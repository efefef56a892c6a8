"""BAdam: one block trains at a time, in order; equal to a plain loop with a fresh torch AdamW per turn; nothing else is held."""

import pytest
import torch

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.selection.badam import BAdam, BAdamSelection
from graftwork.training.step import TrainStep

LAYERS = 3


def batch_of(seed=0):
    ids = tiny.tokens(2, 8, seed).tolist()
    return Collator(0).collate([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def built(config, **options):
    model = tiny.llama(num_hidden_layers=LAYERS, **options).requires_grad_(True).train()
    made = graftwork.optimizer("adamw", model, lr=1e-3, eps=1e-3)  # smooth where gradients are noise
    return TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(model.named_parameters()), (),
                     [BAdamSelection(config)], made, 0.0, (), 100, 5)


def test_every_cycle_visits_every_block_once_in_the_order_asked():
    turns = {order: [BAdamSelection(BAdam(order=order)).active_block(5, t, 4) for t in range(40)]
             for order in ("random", "ascending", "descending")}
    assert turns["ascending"] == [0, 1, 2, 3] * 10 and turns["descending"] == [3, 2, 1, 0] * 10
    cycles = [tuple(turns["random"][i:i + 4]) for i in range(0, 40, 4)]
    assert all(sorted(c) == [0, 1, 2, 3] for c in cycles) and len(set(cycles)) > 4
    assert turns["random"] != [BAdamSelection(BAdam()).active_block(6, t, 4) for t in range(40)]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_the_heaviest_steps_are_the_first_turn_of_the_lowest_of_the_largest_blocks(order):
    step = built(BAdam(interval=4, order=order, embeddings=True))
    selection, ctx = step.selections[0], step.context(0)
    sizes = [sum(p.numel() for p in step.model.parameters() if id(p) in block) for block in selection.blocks(ctx)]
    turn = next(t for t in range(LAYERS + 2) if selection.active_block(5, t, LAYERS + 2) == sizes.index(max(sizes)))
    assert step.heaviest_steps() == range(4 * turn, 4 * turn + 4)
    step.total_steps = 6  # two turns, the second of two steps
    reached = max((0, 1), key=lambda t: (sizes[b := selection.active_block(5, t, LAYERS + 2)], -b))
    assert step.heaviest_steps() == range(4 * reached, min(4 * reached + 4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "descending"])
def test_equals_a_loop_with_a_fresh_torch_optimizer_for_each_block(order):
    config = BAdam(interval=2, order=order)
    step, other = built(config), tiny.llama(num_hidden_layers=LAYERS).requires_grad_(True).train()
    for at in range(12):
        step.run([batch_of(at)], at)
        block = step.selections[0].active_block(5, at // 2, LAYERS)
        own = {n: p for n, p in other.named_parameters() if f".layers.{block}." in n}
        if at % 2 == 0:
            reference = torch.optim.AdamW(list(own.values()), lr=1e-3, eps=1e-3, weight_decay=0.0)
        other.zero_grad()
        batch = batch_of(at)
        CausalLMObjective().loss(other, batch, 1 / batch["n_targets"]).loss.backward()
        reference.step()
        held = {n for n, p in step.parameters if step.optimizer.state.get(p)}
        assert held == set(own)
        nbytes = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values())
        assert nbytes == sum(step.optimizer.state_bytes(p.shape, p.dtype) for p in own.values())
    for (_, p), q in zip(step.parameters, other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tied, blocks", [(True, 5), (False, 5)])
def test_embeddings_and_head_are_blocks_when_asked(tied, blocks):
    config = BAdam(interval=1, order="ascending", embeddings=True)
    step, moved = built(config, tied=tied), []
    for at in range(blocks):
        before = {n: p.detach().clone() for n, p in step.parameters}
        step.compute([batch_of(at)], at)
        grads = {n for n, p in step.parameters if p.grad is not None}
        step.optimizer.step()
        for _, p in step.parameters:
            p.grad = None
        assert grads == {n for n, p in step.parameters if not torch.equal(p, before[n])}
        moved.append(grads)
    assert moved[0] == {"model.embed_tokens.weight"}
    assert moved[-1] == {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert set().union(*moved) == {n for n, _ in step.parameters} and sum(map(len, moved)) == len(step.parameters)
    plain = built(BAdam(interval=1))
    assert len(plain.selections[0].blocks(plain.context(0))) == LAYERS
