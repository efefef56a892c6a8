"""The walk: each block is calibrated on what the quantised blocks before it give."""

import copy
import warnings

import pytest
import torch

import tiny
from graftwork.errors import UsageError
from graftwork.registry import make_config
from graftwork.storage import Storage, apply_storage
from graftwork.storage.base import places, store
from graftwork.storage.calibration.statistics import InputStatistics


def config(**more):
    return make_config("storage", "int3", group_size=16, calibration="gptq", **more)


def inputs(rows=3, length=24, batches=2, padded=True):
    made = []
    for seed in range(batches):
        mask = torch.ones(rows, length, dtype=torch.int64)
        if padded:
            mask[0, length // 2:] = 0
        made.append({"input_ids": tiny.tokens(rows, length, seed=seed), "attention_mask": mask, "labels": torch.zeros(rows)})
    return made


def stored(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Storage)}


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == tiny.LAYERS)


@torch.no_grad()
def by_hand(model, chosen, batches):
    """The same by whole forwards: for each block in turn, statistics of its maps in the model as it is at that point."""
    for number in range(tiny.LAYERS):
        name = next(n for n, m in model.named_modules() if m is blocks_of(model)[number])
        for place in places(model, chosen, name):
            seen = InputStatistics(place.product.in_features, {"hessian"})
            place.module.__dict__["seen"] = seen
            mask = []
            handle = place.module.register_forward_pre_hook(lambda m, args, mask=mask, seen=seen: seen.add(args[0], mask[0]))
            for batch in batches:
                mask[:] = [batch["attention_mask"].bool()]
                model(**{k: v for k, v in batch.items() if k != "labels"})
            handle.remove()
        for place in places(model, chosen, name):
            store(model, place, chosen, place.module.__dict__["seen"])
    return model


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "bert"))])
def test_equals_whole_forwards_of_the_half_quantised_model(name):
    model, batches = tiny.ALL[name](), inputs()
    expected = stored(by_hand(copy.deepcopy(model), config(), batches))
    names, notes = [], []
    apply_storage(model, config(), batches=lambda: iter(batches), on_site=names.append, notes=notes)
    found = stored(model)
    assert set(found) >= set(expected) and sorted(names) == sorted(found)
    for each, module in expected.items():
        assert (module.codes == found[each].codes).float().mean() > 0.999, each  # sums in another order
    nearest = stored(apply_storage(tiny.ALL[name](), make_config("storage", "int3", group_size=16)))
    assert any((nearest[each].codes != found[each].codes).any() for each in found)
    outside = set(found) - set(expected)
    assert outside == ({"pooler.dense"} if name == "bert" else set()) and not notes and model.graft_uncalibrated == []
    assert not any("forward" in m.__dict__ for m in model.modules()) and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_padding_does_not_count():
    plain, padded = inputs(2, 12, 1, padded=False), inputs(2, 12, 1, padded=False)
    for key, fill in (("input_ids", 7), ("attention_mask", 0)):
        padded[0][key] = torch.cat([padded[0][key], torch.full((2, 4), fill)], 1)
    first, second = (stored(apply_storage(tiny.llama().double(), config(), batches=b, notes=[])) for b in (plain, padded))
    assert all((first[n].codes == second[n].codes).float().mean() > 0.999 for n in first)


@pytest.mark.slow
def test_experts_and_what_no_token_reached():
    model, notes = tiny.mixtral(), []
    with torch.no_grad():  # the last expert is never chosen
        for block in model.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] *= 5
    apply_storage(model, config(), batches=inputs(), notes=notes)
    experts = [n for n in stored(model) if ".experts." in n]
    assert len(experts) == 2 * tiny.LAYERS * 4
    nearest = stored(apply_storage(tiny.mixtral(), make_config("storage", "int3", group_size=16)))
    for each in experts:
        calibrated = each not in model.graft_uncalibrated
        assert calibrated == bool((stored(model)[each].codes != nearest[each].codes).any()), each
    assert bool(notes) == bool(model.graft_uncalibrated)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tiny.tokens()).logits).all()


class Rerun(torch.nn.Module):
    """Two blocks that are run twice over."""

    def __init__(self, shared=False):
        super().__init__()
        self.embed = torch.nn.Embedding(tiny.VOCAB, 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.final, self.shared = torch.nn.Linear(16, 16), shared

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in [*self.blocks] * (1 if self.shared else 2):
            x = torch.tanh(block(x))
        return self.final(x)


def test_models_that_cannot_be_walked_and_maps_outside_the_blocks():
    notes = []
    model = apply_storage(Rerun(), config(), batches=inputs(), notes=notes)
    assert "whole forwards" in notes[0] and len(notes) == 1 and not model.graft_uncalibrated and len(stored(model)) == 3
    model, notes = apply_storage(Rerun(shared=True), config(), batches=inputs(), notes=notes), notes[1:]
    assert not notes and not model.graft_uncalibrated and model.final.options.calibration["method"] == "gptq"
    aside = Rerun(shared=True)
    aside.unused = torch.nn.Linear(16, 16)
    with pytest.warns(UserWarning, match="rounded to the nearest.*unused"):
        apply_storage(aside, config(), batches=inputs())
    assert aside.graft_uncalibrated == ["unused"] and aside.unused.options.calibration["method"] == "rtn"


def test_refusals_and_repetition():
    with pytest.raises(UsageError, match="no such data"):
        apply_storage(tiny.llama(), config())
    with pytest.raises(UsageError, match="no such data"):
        apply_storage(tiny.llama(), config(), batches=[])
    broken = tiny.llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match="NaN"):
        apply_storage(broken, config(), batches=inputs())
    model = apply_storage(tiny.llama(), config(), batches=inputs(batches=1))
    before = stored(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_storage(model, config()) is model and stored(model).keys() == before.keys()  # nothing is left to do


@pytest.mark.slow
def test_an_encoder_and_a_decoder():
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    model = T5Model(T5Config(vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0))
    notes = []
    batches = [{**batch, "decoder_input_ids": tiny.tokens(3, 10, seed=5)} for batch in inputs()]
    apply_storage(model.eval(), config(), batches=batches, notes=notes)
    assert not notes and not model.graft_uncalibrated and len(stored(model)) == 2 * (6 + 10)
    last = model.decoder.block[1].layer[2].DenseReluDense.wo
    assert last.options.calibration["method"] == "gptq"


@pytest.mark.slow
def test_layers_of_different_kinds():
    from transformers import Gemma3TextConfig

    chosen = Gemma3TextConfig(vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
                              query_pre_attn_scalar=16, **tiny.SPECIAL)
    model = tiny._build("AutoModelForCausalLM", chosen, 0)
    notes, batches = [], inputs()
    expected = stored(by_hand(copy.deepcopy(model), config(), batches))
    found = stored(apply_storage(model, config(), batches=batches, notes=notes))
    assert not notes and all((found[n].codes == expected[n].codes).float().mean() > 0.99 for n in expected)
