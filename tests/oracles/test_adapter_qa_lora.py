"""QA-LoRA against float64: the pooled product, its full-width factors, and the merge into float zero points."""

import hashlib

import pytest
import torch
from torch import nn

from adapter_support import attach, close
from graftwork.errors import GraftworkError
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage

OUT, IN = 12, 40


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(**options):
    model = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight.copy_(normal(OUT, IN) * 0.1)
        model[0].bias.copy_(normal(OUT, seed=1))
    apply_storage(model, make_config("storage", "int4", **{"group_size": 16, "zero_point": "float", "scale_dtype": "fp32", **options}))
    return model


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("group", [16, 8, -1])
@torch.no_grad()
def test_values_and_factors(group, pooling):
    """Groups of 16, 16 and 8 inputs; the mean of a short group is over what it has."""
    model, x = stored(), normal(2, 3, IN, seed=2)
    before = model(x).double()
    graft = attach(model, "qa_lora", r=3, alpha=6.0, group_size=group, pooling=pooling)
    adapter = next(iter(graft.adapters.values()))
    size = IN if group == -1 else group
    parts = x.double().split(size, -1)
    pooled = torch.stack([p.sum(-1) if pooling == "sum" else p.mean(-1) for p in parts], -1)
    wanted = 2.0 * pooled @ adapter.lora_A.double().T @ adapter.lora_B.double().T
    close(model(x).double() - before, wanted, 1e-5)
    (B, A), = graft.to_lora()[0].values()
    assert A.shape == (3, IN) and graft.to_lora()[1] == 0.0
    close(x.double() @ A.double().T @ B.double().T, wanted, 1e-5)
    assert sum(p.numel() for p in graft.parameters()) == 3 * (-(-IN // size) + OUT)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("group, lossless", [(16, True), (32, True), (-1, True), (8, False), (24, False)])
@torch.no_grad()
def test_merging_writes_zero_points_where_groups_fit(group, lossless, pooling):
    model, x = stored(), normal(5, IN, seed=2)
    before, codes = model(x), hashlib.sha256(model[0].codes.numpy().tobytes()).hexdigest()
    base = model[0].dequantize().double()
    graft = attach(model, "qa_lora", r=3, group_size=group, pooling=pooling)
    learned, adapter = model(x), next(iter(graft.adapters.values()))
    if group == 32 and pooling == "mean":
        lossless = True  # the short last group of the pool is one whole group of the storage
    B, A = (t.double() for t in adapter.factors())
    report = graft.merge()
    assert report.target == ("stored" if lossless else "dense") and report.worst < 1e-5
    close(model(x), learned, 1e-5)
    if lossless:
        held = model[0].graft.whole.frozen.module
        close(held.dequantize(), base + B @ A, 1e-6)
        assert hashlib.sha256(held.codes.numpy().tobytes()).hexdigest() == codes
        columns = list(range(0, IN, 16))
        s, zero = (model[0].leaves()[n].double() for n in ("scale", "zero"))
        close(held.leaves()["zero"], zero - (B @ A)[:, columns] / s, 1e-6)
    graft.detach()
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_merge_in_the_dtype_of_the_base_reports_its_error():
    model = stored(scale_dtype="fp16")
    graft = attach(model, "qa_lora", r=3, group_size=16)
    exact = graft.merge()
    held = model[0].graft.whole.frozen.module
    assert exact.worst < 1e-5 and held.leaves()["zero"].dtype == torch.float32 and held.options.scale_dtype == "fp32"
    graft.unmerge()
    base, change = model[0].dequantize().double(), next(iter(graft.delta_weights().values())).double()
    rounded = graft.merge(requantize=True)
    held = model[0].graft.whole.frozen.module
    assert held.leaves()["zero"].dtype == torch.float16 and held.bits_per_weight == model[0].bits_per_weight
    assert rounded.worst == pytest.approx(float((held.dequantize() - base - change).norm() / change.norm()), rel=1e-3)
    assert 1e-5 < rounded.worst < 0.1


@torch.no_grad()
def test_other_storages_merge_like_a_lora():
    """An integer zero point cannot hold the change: quantizing again would, at a loss that is reported or refused."""
    model = stored(zero_point="integer")
    graft = attach(model, "qa_lora", r=3, group_size=16, pooling="sum")
    with graft.disabled():
        weight = model[0].dequantize()
    report = graft.merge()
    assert report.target == "dense" and report.worst < 1e-5
    graft.unmerge()
    graft.scale(1e-2)
    with pytest.raises(GraftworkError, match="would lose"):
        graft.merge(requantize=True)
    assert torch.equal(model[0].dequantize(), weight)
