"""The nystrom start of LoRA: the equations by hand, exact recovery of low-rank weights, export and plan."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import graftwork
import tiny
from adapter_support import close, fill, output
from graftwork.errors import UsageError
from graftwork.modeling.protocols import is_conv1d
from graftwork.registry import lookup

IDS = tiny.tokens(2, 7)
K = "model.layers.0.self_attn.k_proj"  # 32 x 64


def loaded(tmp_path, kind, storage):
    folder = tmp_path / kind
    if not folder.exists():
        tiny.save(tiny.ALL[kind](), folder)
    return graftwork.load(folder, storage=storage, dtype="fp32")[0]


@torch.no_grad()
def test_the_official_start():
    """Delta at step 0 is s W[:, :r] W[:r, :r] W[:r, :], and the output is shifted by it."""
    for kind in ("llama", "gpt2"):
        model = tiny.ALL[kind]()
        graft = graftwork.attach(model, "lora", r=4, alpha=6.0, initializer={"method": "nystrom", "subtract": False})
        for name, change in graft.delta_weights().items():
            W = graft.sites[name].product.dense()
            close(change, 1.5 * W[:, :4] @ W[:4, :4] @ W[:4], 1e-6)
        assert len(list(graft.adapters.values())[0].artifact_state()) == 2


@torch.no_grad()
def test_nystrom_recovers_a_low_rank_weight():
    model = tiny.llama()
    layer = model.get_submodule(K)
    generator = torch.Generator().manual_seed(1)
    layer.weight.copy_(torch.randn(32, 4, generator=generator) @ torch.randn(4, 64, generator=generator) * 0.1)
    before = output(model, IDS)
    for landmarks in ("first", "sampled"):
        graft = graftwork.attach(model, "lora", r=4, name=landmarks, target_modules=["k_proj"], layers_to_transform=[0],
                                 initializer={"method": "nystrom", "core": "nystrom", "landmarks": landmarks})
        a = graft.adapters[K]
        close(a.lora_B @ a.lora_A, layer.weight, 1e-3)
        close(output(model, IDS), before, 1e-5)
    first, sampled = (model.graft_state.grafts[n].adapters[K].lora_A for n in ("first", "sampled"))
    assert torch.equal(first, layer.weight[:4]) and not torch.equal(first, sampled)
    assert all(any(torch.equal(row, w) for w in layer.weight) for row in sampled)


@pytest.mark.parametrize("core", ["block", "nystrom"])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@torch.no_grad()
def test_subtracted_start_export_and_file(storage, core, tmp_path):
    model = loaded(tmp_path, "gpt2", storage)
    before = output(model, IDS)
    graft = graftwork.attach(model, "lora", r=3, alpha=4.0,
                             initializer={"method": "nystrom", "core": core, "landmarks": "sampled"})
    close(output(model, IDS), before, 1e-4 if core == "nystrom" else 1e-5)
    fill(graft, size=0.02)
    learned = output(model, IDS)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 6 for _, A in pairs.values())
    if storage == "dense":
        fresh = loaded(tmp_path, "gpt2", storage)
        for name, (B, A) in pairs.items():
            module = fresh.get_submodule(name)
            module.weight += (B @ A).T if is_conv1d(module) else B @ A
        close(output(fresh, IDS), learned, 1e-4)
    graft.save(tmp_path / "saved")
    again = loaded(tmp_path, "gpt2", storage)
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), learned)


def test_refusals_and_plan():
    with pytest.raises(UsageError, match="added to W"):
        graftwork.attach(tiny.llama(), "lora", initializer={"method": "nystrom", "core": "nystrom", "subtract": False})
    with pytest.raises(UsageError, match="takes 33 ranks.*32 x 64"):
        graftwork.attach(tiny.llama(), "lora", r=33, initializer="nystrom")
    info = lookup("initializer", "nystrom")
    with FakeTensorMode():
        for subtract, factor in ((True, 2), (False, 1)):
            graft = graftwork.attach(tiny.llama(), "lora", r=4)
            trained = sum(p.nbytes for n, p in graft.named_parameters())
            info.cls(info.config(subtract=subtract)).plan_extra(graft)
            assert sum(p.nbytes for _, p in graft.named_parameters(trainable=False)) == factor * trained
