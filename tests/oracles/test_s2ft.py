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


@pytest.mark.slow
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


# -- chosen units ---------------------------------------------------------------------------------------------------------
CHOICES = {"weight": {}, "activations": {"method": "s2ft_activations", "batches": 2},
           "product": {"method": "s2ft_activations", "score": "product", "batches": 2},
           "label mask": {"method": "s2ft_activations", "label_mask": True, "batches": 2},
           "gradients": {"method": "s2ft_gradients", "batches": 2}, "one batch": {"method": "s2ft_gradients", "batches": 1}}


def data():
    """Two batches with padding and untrained tokens."""
    for seed in range(2):
        ids, mask = tiny.tokens(3, 8, seed=seed + 7), torch.ones(3, 8, dtype=torch.int64)
        mask[0, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def line_values(model, name, axis, choice):
    """The squares of the numbers that score each line of one matrix, in fp64 from their definitions."""
    module, batches = model.get_submodule(name), list(data())[: CHOICES[choice].get("batches", 0)]
    W, along = module.weight.detach().double(), 0 if axis == "columns" else 1
    if choice == "weight":
        return W.square().sum(along)
    if CHOICES[choice]["method"] == "s2ft_gradients":
        total = torch.zeros_like(W)
        for batch in batches:
            (grad,) = torch.autograd.grad(model(**batch).loss, module.weight)
            total += grad.double() / len(batches)
        return total.square().sum(along)
    seen = []
    handle = module.register_forward_hook(lambda m, args, y: seen.append((args[0] if axis == "columns" else y).detach().double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    keep = [(b["labels"] != -100) if choice == "label mask" else b["attention_mask"].bool() for b in batches]
    squares = torch.cat([x[k] for x, k in zip(seen, keep)]).square().mean(0)
    return squares * W.square().sum(along) if choice == "product" else squares


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_takes_the_units_of_a_float64_reference(choice, small):
    plain = tiny.llama().requires_grad_(True)
    options = {"ratio": 0.25, "target_modules": ROLES}
    if choice == "weight":
        options["selection"] = "weight_small" if small else "weight_large"
    else:
        options |= {"initializer": {**CHOICES[choice], "pick": "small" if small else "large"}, "batches": data()}
    graft = graftwork.attach(tiny.llama(), "s2ft", **options)
    for role, width, axis in (("v_proj", 16, "rows"), ("o_proj", 16, "columns"), ("up_proj", 1, "rows"), ("down_proj", 1, "columns")):
        names = [n for n in graft.adapters if n.endswith(role)]
        scores = torch.cat([line_values(plain, n, axis, choice).view(-1, width).sum(1) for n in names])
        best = scores.sort(descending=not small).indices[: int(0.25 * len(scores))].tolist()
        units = len(scores) // len(names)
        for i, name in enumerate(names):
            wanted = sorted(u * width + k for b in best for u in [b - i * units] if 0 <= u < units for k in range(width))
            assert graft.adapters[name].lines.tolist() == wanted, name
            S = graft.adapters[name].S
            assert (S is None) == (not wanted) and (S is None or not S.any())


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_chosen_units_are_read_from_the_artifact(storage, tmp_path):
    """A load trains and serves the saved lines, whatever the weights or the data would choose now."""
    files = tiny.save(tiny.llama(), tmp_path / "model")
    first, second = (graftwork.load(files, storage=storage)[0] for _ in range(2))
    graft = fill(graftwork.attach(first, "s2ft", initializer="s2ft_gradients", batches=data(), target_modules=ROLES, ratio=0.3))
    weights = fill(graftwork.attach(first, "s2ft", selection="weight_small", name="b", target_modules=ROLES, ratio=0.3))
    for each in (graft, weights):
        each.save(tmp_path / each.name)
        loaded = graftwork.attach_saved(second, tmp_path / each.name)
        assert all(torch.equal(a.lines, loaded.adapters[n].lines) for n, a in each.adapters.items())
    assert torch.equal(output(first, IDS), output(second, IDS))
    assert any(a.lines.tolist() != weights.adapters[n].lines.tolist() for n, a in graft.adapters.items())
    with pytest.raises(RuntimeError, match="lines outside of 0..95"):
        adapter = graft.adapters["model.layers.0.mlp.down_proj"]
        adapter.load_artifact_state({"lines": torch.tensor([96], dtype=torch.int32), "S": torch.zeros(64, 1)})


def test_two_choices_are_refused():
    with pytest.raises(UsageError, match="s2ft_gradients chooses the units, and so does adapter.selection: weight_large"):
        graftwork.attach(tiny.llama(), "s2ft", selection="weight_large", initializer="s2ft_gradients", batches=data())
    with pytest.raises(UsageError, match="no token"):
        graftwork.attach(tiny.llama(), "s2ft", initializer="s2ft_activations", batches=[])
    with pytest.raises(graftwork.GraftworkError, match="starts s2ft, not lora|starts s2ft, not 'lora'"):
        graftwork.attach(tiny.llama(), "lora", initializer="s2ft_activations", batches=data())


@pytest.mark.slow
def test_a_recipe_with_chosen_units_plans_runs_and_resumes(tmp_path):
    from training_support import plans_runs_and_resumes

    made, whole = plans_runs_and_resumes(
        tmp_path, adapter={"method": "s2ft", "ratio": 0.2, "per_layer": True}, initializer={"method": "s2ft_gradients", "batches": 2})
    drawn = graftwork.attach(tiny.llama(), "s2ft", ratio=0.2, per_layer=True)
    assert not made.notes
    assert any(a.lines.tolist() != drawn.adapters[n].lines.tolist() for n, a in whole.grafts[0].adapters.items())
