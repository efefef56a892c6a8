"""The coupling graph: exchanging the units of any group keeps the logits, restoring keeps every bit, and what is not known is
refused."""

from __future__ import annotations

import copy

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import UsageError
from graftwork.modeling.coupling import Coupling, heads_of, units_of
from graftwork.modeling.sites import find_sites
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage

IDS = tiny.tokens(2, 9)


def family(name, **more):
    """Families that have no builder of their own: Llama's sizes under another class."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**tiny._shape(num_key_value_heads=2, initializer_range=0.1, **tiny.SPECIAL, **more))
    return tiny._build("AutoModelForCausalLM", config, 0)


MODELS = {**tiny.ALL, "mha": lambda: tiny.llama(gqa=False, tied=False), "qwen2": lambda: family("Qwen2"),
          "mistral": lambda: family("Mistral"), "phi3": lambda: family("Phi3"), "bert_classifier": tiny.bert_classifier}


def random_order(group, generator):
    """An order that moves something in every block of two units or more."""
    parts = []
    for start in range(0, group.units, group.block):
        moved = torch.randperm(group.block, generator=generator)
        parts.append(start + (moved.flip(0) if torch.equal(moved, torch.arange(group.block)) else moved))
    return torch.cat(parts)


def logits(model):
    answer = model(IDS)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_permuting_keeps_the_logits_and_restoring_every_bit(kind):
    model, generator = MODELS[kind](), torch.Generator().manual_seed(0)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    coupling = Coupling(model)
    kinds = {g.kind for g in coupling.groups}
    assert kinds == {"kv_groups", "query_heads", "channels"} and len({g.layer for g in coupling.groups}) == tiny.LAYERS
    groups = [*coupling.groups, coupling.group("residual")]
    backwards = []
    for group in groups:
        moved = {name: v.clone() for name, v in model.state_dict().items()}
        backwards.append((group, coupling.permute(group, random_order(group, generator))))
        touched = {name for name, v in model.state_dict().items() if not torch.equal(v, moved[name])}
        assert touched or group.block == 1, group
    after = logits(model)
    if kind == "bert":  # the output itself is the residual stream
        after = after[..., backwards[-1][1]]
    close(after, before, 2e-5)
    for group, undo in reversed(backwards):
        coupling.permute(group, undo)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_query_heads_do_not_leave_their_group():
    model = tiny.llama()
    coupling, before = Coupling(model), output(model, IDS)
    queries = coupling.group("query_heads", 1)
    assert (queries.units, queries.block) == (4, 2) and heads_of(model).per_group == 2
    with pytest.raises(UsageError, match="blocks of 2"):
        coupling.permute(queries, [2, 1, 0, 3])
    queries.block = 4  # what reading Q as if every head had a key of its own amounts to
    coupling.permute(queries, [2, 1, 0, 3])
    assert (output(model, IDS) - before).abs().max() > 0.1


@torch.no_grad()
def test_a_group_needs_all_its_parts():
    for kind, layer in (("kv_groups", 0), ("channels", 1), ("residual", -1)):
        model = tiny.llama()
        coupling, before = Coupling(model), output(model, IDS)
        group = coupling.group(kind, layer)
        del group.parts[-1]
        coupling.permute(group, list(range(group.units))[::-1])
        assert (output(model, IDS) - before).abs().max() > 0.1


def test_tied_weights_are_named_and_moved_once():
    assert Coupling(tiny.llama()).tied == [("model.embed_tokens.weight", "lm_head.weight")]
    assert Coupling(tiny.qwen3()).tied == []
    parts = [p.parameter for p in Coupling(tiny.llama()).group("residual").parts]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(parts)


def test_units_of_sites():
    model = tiny.llama()
    units = {s.name.split(".")[-1]: (s, units_of(s)) for s in find_sites(model) if s.layer == 0}
    assert {n: (u.axis, tuple(u.index.shape)) for n, (_, u) in units.items()} == {
        "q_proj": ("rows", (4, 16)), "k_proj": ("rows", (2, 16)), "v_proj": ("rows", (2, 16)), "o_proj": ("columns", (4, 16)),
        "gate_proj": ("rows", (96, 1)), "up_proj": ("rows", (96, 1)), "down_proj": ("columns", (96, 1))}
    fused = next(s for s in find_sites(tiny.gpt2()) if s.role == "qkv")
    assert units_of(fused).lines([1])[:3] == [16, 17, 18] and units_of(fused).lines([1])[16] == 64 + 16
    (key,) = find_sites(tiny.gpt2(), "k", layers=[0])
    assert units_of(key).lines([3]) == list(range(48, 64))


def test_unknown_structure_is_refused():
    model = tiny.llama()
    model.config.model_type = "quaint"
    with pytest.raises(UsageError, match="type 'quaint' is not known[\\s\\S]*remedy: known: bert, gpt2"):
        Coupling(model)
    odd = tiny.llama()
    odd.model.layers[1].self_attn.o_proj = torch.nn.Linear(48, 64)
    with pytest.raises(UsageError, match="o_proj' has no known heads.*48 columns, 64 were expected"):
        Coupling(odd)
    headed = tiny.llama()
    headed.extra = torch.nn.LayerNorm(64)
    with pytest.raises(UsageError, match="how 'extra.weight' lies"):
        Coupling(headed).group("residual")
    with pytest.raises(UsageError, match="lm_head' has no known heads"):
        units_of(find_sites(model_with_head := tiny.llama(tied=False), ["lm_head"])[0])
    with pytest.raises(UsageError, match="no group 'channels'"):
        Coupling(model_with_head).group("channels", 7)
    del headed.extra
    with pytest.raises(UsageError, match="no order of 96"):
        Coupling(headed).permute(Coupling(headed).group("channels", 0), [0] * 96)
    grafted = copy.deepcopy(headed)
    attach(grafted, "lora")
    with pytest.raises(UsageError, match="detach them"):
        Coupling(grafted).permute(Coupling(grafted).group("channels", 0), range(96))
    apply_storage(headed, make_config("storage", "nf4"))
    with pytest.raises(UsageError, match="storage: dense"):
        Coupling(headed).permute(Coupling(headed).group("channels", 0), range(96))
    assert issubclass(UsageError, graftwork.GraftworkError)
