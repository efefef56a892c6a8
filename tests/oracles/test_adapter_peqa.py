"""PEQA against float64: values and gradients of y = x ((s + ds) * C)^T, the integers untouched by training and merging, and its count."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import ArtifactError, IncompatibleError, RecipeError
from graftwork.interchange.merged import write_merged
from graftwork.recipe import load_recipe
from graftwork.registry import lookup, make_config
from graftwork.storage import _tiles
from graftwork.storage._packing import unpack
from graftwork.storage.base import apply_storage


def site(out=24, columns=40, rows=10, **options):
    """A model of one stored map with a bias, its input, and (C, s, groups) in float64 by the definition."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, out))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(out, columns, generator=generator) * 0.1)
        model[0].bias.copy_(torch.randn(out, generator=generator))
    method = options.pop("method", "int3")
    apply_storage(model, make_config("storage", method, **{"group_size": 16, **options}))
    leaves = model[0].leaves()
    C = unpack(leaves["codes"], columns, int(method[-1])).double() - (4.0 if "zero" not in leaves else 0.0)
    size = options.get("group_size", 16)
    group = torch.arange(columns) // (columns if size == -1 else size)
    if "zero" in leaves:
        C = C - leaves["zero"].double()[:, group]
    return model, torch.randn(2, rows // 2, columns, generator=generator), C, leaves["scale"].double(), group


def codes(model):
    """Checksums of all integers of a model."""
    return {n: hashlib.sha256(m.codes.numpy().tobytes()).hexdigest() for n, m in model.named_modules() if hasattr(m, "codes")}


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"zero_point": "float"}, {"group_size": -1}], ids=str)
def test_output_and_gradients_are_those_of_the_equations(options, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 7 * 40)  # tiles of 7 rows, and a shorter last one
    model, x, C, s, group = site(**options)
    bias = model[0].bias.double()
    graft = attach(model, "peqa")
    ds = next(iter(graft.adapters.values())).scale_change
    x.requires_grad_()
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()

    s, change, wide = s.requires_grad_(), ds.detach().double(), x.detach().double().requires_grad_()
    wanted = F.linear(wide, (s + change)[:, group] * C, bias)
    (wanted * weight.double()).sum().backward()
    close(y, wanted, 1e-5)
    close(x.grad, wide.grad, 1e-5)
    close(ds.grad, s.grad, 1e-5)
    if options.get("group_size") == -1:  # the shortcut of one scale a row
        shortcut = (weight.double() * (wanted - bias)).sum((0, 1)) / (s + change).squeeze(1)
        close(ds.grad.squeeze(1), shortcut, 1e-5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        model(x)
    assert saved == [x.numel(), ds.numel()], "only x and the scales are kept for the backward pass"


def test_a_group_of_a_whole_row_is_a_scale_a_row():
    one, other = site(group_size=-1)[0], site(group_size=40)[0]
    for model in (one, other):
        attach(model, "peqa")
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(one(x), other(x))


@torch.no_grad()
def test_merging_writes_scales_and_leaves_the_integers(tmp_path):
    model, x, C, s, group = site(scale_dtype="fp16")
    kept, before = codes(model), model(x)
    graft = attach(model, "peqa")
    learned, adapter = model(x), next(iter(graft.adapters.values()))
    exact = (s + adapter.scale_change.double())[:, group] * C
    report = graft.merge()
    held = model[0].graft.whole.frozen.module
    assert report.target == "stored" and report.worst < 1e-6 and held.options.scale_dtype == "fp32"
    assert torch.equal(held.leaves()["codes"], model[0].leaves()["codes"]) and codes(model) == kept
    assert torch.equal(held.leaves()["scale"], model[0].leaves()["scale"].float() + adapter.scale_change)
    assert torch.equal(model(x), learned)
    close(held.dequantize(), exact, 1e-6)
    graft.unmerge()
    rounded = graft.merge(requantize=True)  # in the dtype of the base's scales
    held = model[0].graft.whole.frozen.module
    assert held.leaves()["scale"].dtype == torch.float16 and held.bits_per_weight == model[0].bits_per_weight
    assert rounded.worst == pytest.approx(float((held.dequantize() - exact).norm() / (adapter.delta_weight(None)).norm()), rel=1e-2)
    assert 1e-5 < rounded.worst < 1e-2
    graft.detach()
    assert torch.equal(model(x), before) and codes(model) == kept


@pytest.mark.slow
def test_training_never_writes_an_integer_and_other_integers_are_refused(tmp_path):
    place = tiny.save(tiny.llama(), tmp_path / "base")
    model, _ = graftwork.load(place, storage={"method": "int4", "group_size": 32}, dtype="fp32")
    kept, ids = codes(model), tiny.tokens(2, 8)
    graft = attach(model, "peqa", filled=False)
    optimizer = torch.optim.Adam(graft.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(output(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1 and codes(model) == kept and kept
    graft.save(tmp_path / "scales")
    other, _ = graftwork.load(place, storage={"method": "int4", "group_size": 32, "symmetric": True}, dtype="fp32")
    with pytest.raises(ArtifactError, match="other integers"):
        graftwork.attach_saved(other, tmp_path / "scales")
    coarse, _ = graftwork.load(place, storage={"method": "int4", "group_size": 64}, dtype="fp32")
    with pytest.raises(ArtifactError):
        graftwork.attach_saved(coarse, tmp_path / "scales")


def test_parameters_of_known_models():
    """32 (4 x 4096 + 2 x 11008 + 4096) of LLaMA-7B with a scale a row."""
    def square(out, columns):
        return type("Shape", (), {"name": "x", "in_features": columns, "out_features": out})()

    count = lookup("adapter", "peqa").cls.parameter_count
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert 32 * sum(count(square(*shape), make_config("adapter", "peqa")) for shape in shapes) == 1_359_872
    model, *_ = site(group_size=-1)
    assert attach(model, "peqa").parameter_count() == 24


def test_a_base_without_scales_is_refused_before_it_is_loaded(tmp_path):
    text = "model: {model}\nadapter: peqa\ndata: {{train: x.jsonl}}\noutput_dir: out\nstorage: {storage}\n"
    for storage in ("dense", "nf4"):
        (tmp_path / "r.yaml").write_text(text.format(model=tmp_path / "nowhere", storage=storage))
        with pytest.raises(RecipeError, match="storage: int4"):
            load_recipe(tmp_path / "r.yaml")
    with pytest.raises(IncompatibleError, match="storage: int4"):
        attach(nn.Sequential(nn.Linear(8, 8)), "peqa")


@pytest.mark.slow
@torch.no_grad()
def test_a_merged_folder_on_the_grid_of_the_base_keeps_its_integers(tmp_path):
    """`requantize` of a folder: the scales are rounded, nothing is quantized again."""
    place = tiny.save(tiny.llama(tied=False), tmp_path / "base")
    model, _ = graftwork.load(place, storage={"method": "int4", "group_size": 32}, dtype="fp32")
    graft = attach(model, "peqa")
    report = write_merged(graft, tmp_path / "merged", requantize=True)
    assert 1e-5 < report.worst < 1e-2
    graft.merge(requantize=True)
    close(output(graftwork.load(tmp_path / "merged", dtype="fp32")[0], tiny.tokens()), output(model, tiny.tokens()), 1e-5)


@pytest.mark.slow
def test_scales_alone_recover_what_rounding_lost():
    """Held-out loss of a tiny trained model: 0.794, in 2 bits 1.000, after 30 steps of its scales 0.841; the integers are the same."""
    def chain(rows, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, 128, (rows, 1), generator=generator)
        for _ in range(19):
            ids = torch.cat([ids, 4 + (ids[:, -1:] * 7 + torch.randint(0, 2, (rows, 1), generator=generator)) % 124], 1)
        return ids

    def loss(model, ids):
        return F.cross_entropy(output(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def trained(model, parameters, lr, steps):
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for step in range(steps):
            optimizer.zero_grad()
            loss(model, chain(16, 100 + step)).backward()
            optimizer.step()
        with torch.no_grad():
            return float(loss(model, chain(32, 1)))

    model = tiny.llama()
    full = trained(model, list(model.parameters()), 5e-3, 120)
    apply_storage(model, make_config("storage", "int2", group_size=32))
    rounded, kept = trained(model, [torch.nn.Parameter(torch.zeros(1))], 0.0, 0), codes(model)
    graft = attach(model, "peqa", filled=False)
    tuned = trained(model, graft.parameters(), 3e-3, 30)
    assert rounded > full + 0.1 and rounded - tuned > 0.5 * (rounded - full) and codes(model) == kept, (full, rounded, tuned)


@torch.no_grad()
def test_beside_other_grafts_merged_or_not():
    """The change belongs to the base's own integers, whatever other grafts put in the place of the weight."""
    model, x, *_ = site(zero_point="float")
    bare = model(x)
    grafts = {name: attach(model, method, name=name, seed=i, **more) for i, (name, method, more) in enumerate([
        ("a", "peqa", {}), ("b", "peqa", {}), ("l", "lora", {"r": 2}), ("q", "qa_lora", {"r": 2, "group_size": 16})])}
    together = model(x)
    changes = []
    for name in grafts:
        with graftwork.routing(model, [name] * 2):
            changes.append(model(x) - bare)
    close(together, bare + sum(changes), 1e-5)
    for graft in grafts.values():
        graft.merge()
        close(model(x), together, 1e-5)
        graft.unmerge()
    assert torch.equal(model(x), together)
