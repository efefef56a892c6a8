"""S2FT: equal to the permuted base with contiguous trained slices, gradients are slices of the dense ones, counts exact."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.s2ft import S2FTAdapter
from graftwork.errors import UsageError
from graftwork.modeling.coupling import Coupling
from graftwork.modeling.sites import find_sites

IDS = tiny.tokens(2, 7)
ROLES = ["v_proj", "o_proj", "up_proj", "down_proj"]


def test_it_is_the_permuted_model_with_contiguous_slices():
    """The paper's form by hand: order each layer's channels as only-up, both, only-down, rest; then both slices are one block."""
    model = tiny.llama()
    by_hand = copy.deepcopy(model)
    graft = attach(model, "s2ft", ratio=0.3, target_modules=["up_proj", "down_proj"])
    coupling = Coupling(by_hand)
    with torch.no_grad():
        for layer in range(tiny.LAYERS):
            up, down = (graft.adapters[f"model.layers.{layer}.mlp.{n}_proj"] for n in ("up", "down"))
            u, d = up.lines.tolist(), down.lines.tolist()
            assert u != d and 0 < len(u) < 96 and 0 < len(d) < 96
            first, both = [c for c in u if c not in d], [c for c in u if c in d]
            last = [c for c in d if c not in u]
            order = first + both + last + [c for c in range(96) if c not in u and c not in d]
            coupling.permute(coupling.group("channels", layer), order)
            mlp = by_hand.model.layers[layer].mlp
            mlp.up_proj.weight[: len(u)] += up.S[[u.index(c) for c in order[: len(u)]]]
            columns = slice(len(first), len(first) + len(d))
            mlp.down_proj.weight[:, columns] += down.S[:, [d.index(c) for c in order[columns]]]
        close(output(model, IDS), output(by_hand, IDS), 2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert"])
def test_gradients_are_lines_of_the_dense_gradient(kind):
    model = tiny.ALL[kind]()
    dense = copy.deepcopy(model)
    graft = graftwork.attach(model, "s2ft", ratio=0.4, per_layer=True, target_modules="all-linear")
    dense.requires_grad_(True)
    output(model, IDS).square().mean().backward()
    output(dense, IDS).square().mean().backward()
    for name, adapter in graft.adapters.items():
        module = dense.get_submodule(name)
        full = module.weight.grad.T if kind == "gpt2" else module.weight.grad
        lines = adapter.lines.long()
        close(adapter.S.grad, full[:, lines] if adapter.axis == "columns" else full[lines], 1e-4)


def smollm2():
    """SmolLM2-135M without values: the sizes decide the numbers."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True))


def test_counts_on_smollm2():
    graft_config = graftwork.attach(tiny.llama(), "s2ft").config
    model = smollm2()

    def drawn(names, **options):
        config = graft_config.model_copy(update=options)
        sites = find_sites(model, names)
        return S2FTAdapter.make_shared(sites, config, 0).lines, sites, config

    lines, _, _ = drawn(["down_proj"])
    assert sum(len(v) for _, v in lines.values()) == 1382 and 1382 * 576 == 796_032
    assert len({len(v) for _, v in lines.values()}) > 1, "the draw is over the whole model"
    lines, sites, config = drawn(["down_proj"], per_layer=True)
    assert {len(v) for _, v in lines.values()} == {46} and S2FTAdapter.parameter_count(sites[0], config) == 46 * 576
    lines, sites, config = drawn(["o_proj", "v_proj"], ratio=0.2, per_layer=True)
    assert {(axis, len(v)) for axis, v in lines.values()} == {("columns", 64), ("rows", 64)}, "one head of 9, one of 3"
    for axis, own in lines.values():
        assert own == list(range(own[0], own[0] + 64)) and own[0] % 64 == 0 and max(own) < (576 if axis == "columns" else 192)


def test_the_draw():
    graft = graftwork.attach(tiny.llama(), "s2ft", ratio=0.25, target_modules=ROLES, ratio_pattern={"down_proj": 0.5})
    numbers = {role: sum(len(a.lines) for n, a in graft.adapters.items() if n.endswith(role)) for role in ROLES}
    assert numbers == {"v_proj": 1 * 16, "o_proj": 2 * 16, "up_proj": 48, "down_proj": 96}
    again = graftwork.attach(tiny.llama(), "s2ft", ratio=0.25, target_modules=ROLES, ratio_pattern={"down_proj": 0.5})
    other = graftwork.attach(tiny.llama(), "s2ft", ratio=0.25, target_modules=ROLES, ratio_pattern={"down_proj": 0.5}, seed=1)
    assert all(torch.equal(a.lines, again.adapters[n].lines) for n, a in graft.adapters.items())
    assert any(a.lines.tolist() != other.adapters[n].lines.tolist() for n, a in graft.adapters.items())
    assert {n.split(".")[-1] for n in graftwork.attach(tiny.llama(), "s2ft").adapters} == {"down_proj"}


def test_a_site_of_which_nothing_was_drawn(tmp_path):
    """One of the four key/value heads of the model: one site has it, the other trains nothing and changes nothing."""
    model = tiny.llama()
    before = output(model, IDS)
    graft = fill(graftwork.attach(model, "s2ft", ratio=0.25, target_modules=["v_proj"], name="a"))
    empty, full = sorted(graft.adapters.values(), key=lambda a: len(a.lines))
    assert empty.S is None and full.S.shape == (16, 64) and graft.parameter_count() == 16 * 64
    with torch.no_grad():
        live = output(model, IDS)
        assert not torch.allclose(live, before)
        assert not empty.delta_weight(None).any() and empty.delta(torch.ones(1, 64), None).shape == (1, 32)
        assert all(pair[1].shape[0] >= 1 for pair in graft.to_lora()[0].values())
        with graftwork.routing(model, ["a", None]):
            mixed = output(model, IDS)
        close(mixed[0], live[0])
        close(mixed[1], before[1])
        graft.merge()
        close(output(model, IDS), live, 1e-5)
        graft.unmerge()
    graft.save(tmp_path / "saved")
    loaded = tiny.llama()
    graftwork.attach_saved(loaded, tmp_path / "saved")
    assert torch.equal(output(loaded, IDS), live)


def test_disjoint_units_add_without_interference():
    model = tiny.llama()
    first = attach(model, "s2ft", ratio=0.3, target_modules=["down_proj"])
    second = attach(model, "s2ft", ratio=0.3, target_modules=["down_proj"], name="b", seed=5)
    with torch.no_grad():
        for name, adapter in second.adapters.items():
            free = [c for c in range(96) if c not in first.adapters[name].lines.tolist()][: len(adapter.lines)]
            adapter.lines.data = torch.tensor(free, dtype=torch.int32)
            adapter.S = torch.nn.Parameter(adapter.S[:, : len(free)].clone())
        one, two = first.delta_weights(), second.delta_weights()
        assert all(not (one[n].any(0) & two[n].any(0)).any() for n in one)


def saved_bytes(run, known):
    """Bytes of distinct storages saved for the backward pass that do not belong to `known` tensors."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    own = {t.untyped_storage().data_ptr() for t in known}
    return sum(s.nbytes() for pointer, s in kept.items() if pointer not in own), result


def test_columns_keep_only_their_inputs():
    graft = graftwork.attach(tiny.llama(), "s2ft", ratio=0.1, per_layer=True, target_modules=["layers.0.mlp.down_proj"])
    (adapter,) = graft.adapters.values()
    module = graft.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 7, 96, requires_grad=True)
    total, _ = saved_bytes(lambda: module(x * 1.0), [*adapter.parameters(), module.weight])
    assert len(adapter.lines) == 9 and total == 14 * 9 * 4


def test_unknown_structure_is_refused_before_anything_is_attached():
    model = tiny.llama()
    model.config.model_type = "quaint"
    with pytest.raises(UsageError, match="not known[\\s\\S]*remedy"):
        graftwork.attach(model, "s2ft")
    with pytest.raises(UsageError, match="no known heads or channels"):
        graftwork.attach(tiny.llama(tied=False), "s2ft", target_modules=["lm_head"])
    square = SimpleNamespace(name="square", in_features=100, out_features=7)
    assert S2FTAdapter.parameter_count(square, graftwork.attach(tiny.llama(), "s2ft").config) == 3 * 7
