"""OLoRA against peft and against the QR decomposition; on dense and on quantized storage the start changes nothing."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import graftwork
import tiny
from adapter_support import close, fill, output
from graftwork.errors import IncompatibleError, UsageError
from graftwork.modeling.protocols import is_conv1d
from graftwork.registry import lookup

IDS = tiny.tokens(2, 7)


def loaded(tmp_path, kind, storage):
    """A tiny model from a folder, so that it can be stored in any format and saved grafts can be attached to it."""
    folder = tmp_path / kind
    if not folder.exists():
        tiny.save(tiny.ALL[kind](), folder)
    return graftwork.load(folder, storage=storage, dtype="fp32")[0]


def test_equals_peft_and_trains_like_it():
    from peft import LoraConfig, get_peft_model

    ours, theirs = tiny.llama(), tiny.llama()
    names = ["q_proj", "down_proj", "k_proj"]
    graft = graftwork.attach(ours, "lora", r=4, alpha=6.0, target_modules=names, initializer="olora")
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights="olora"))
    for name, adapter in graft.adapters.items():
        layer = peft.base_model.model.get_submodule(name)
        torch.testing.assert_close(adapter.lora_A, layer.lora_A["default"].weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(adapter.lora_B, layer.lora_B["default"].weight, atol=1e-6, rtol=1e-5)
    for model, parameters in ((ours, graft.parameters()), (peft, [p for p in peft.parameters() if p.requires_grad])):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(output(ours, IDS), output(peft, IDS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_the_start_is_the_qr_of_the_weight_and_changes_nothing(kind, storage, tmp_path):
    model = loaded(tmp_path, kind, storage)
    before = output(model, IDS)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    graft = graftwork.attach(model, "lora", r=3, alpha=6.0, initializer="olora", target_modules="all-linear")
    close(output(model, IDS), before, 5e-6)
    for name, adapter in graft.adapters.items():
        W = graft.sites[name].product.dense().float()
        B, A = adapter.lora_B, adapter.lora_A
        torch.testing.assert_close(B.T @ B, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(A, B.T @ W, atol=1e-5, rtol=1e-4)  # the rows of R are what Q sees of W
        torch.testing.assert_close(W[:, :3], B @ A[:, :3], atol=1e-5, rtol=1e-4)  # QR: the first r columns exactly
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())  # nothing stored was rewritten
    fill(graft, size=0.02)
    learned = output(model, IDS)
    graft.save(tmp_path / "saved")
    again = loaded(tmp_path, kind, storage)
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(output(again, IDS), learned)


@torch.no_grad()
def test_exports_as_rank_2r_on_the_pristine_base():
    model = tiny.gpt2()
    graft = fill(graftwork.attach(model, "lora", r=3, initializer="olora"), size=0.02)
    learned = output(model, IDS)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 6 for _, A in pairs.values())
    fresh = tiny.gpt2()
    for name, (B, A) in pairs.items():
        module = fresh.get_submodule(name)
        module.weight += (B @ A).T if is_conv1d(module) else B @ A
    close(output(fresh, IDS), learned, 1e-5)


def test_refusals_and_plan():
    with pytest.raises(UsageError, match="takes 33 ranks.*32 x 64"):
        graftwork.attach(tiny.llama(), "lora", r=33, initializer="olora", target_modules=["k_proj"])
    with pytest.raises(UsageError, match="takes 40 ranks"):
        graftwork.attach(tiny.llama(), "lora", r=4, rank_pattern={"k_proj": 40}, initializer="olora", target_modules=["k_proj"])
    with pytest.raises(IncompatibleError, match="starts lora"):
        graftwork.attach(tiny.llama(), "paca", initializer="olora")
    info = lookup("initializer", "olora")
    with FakeTensorMode():
        graft = graftwork.attach(tiny.llama(), "lora", r=4)
        plain = sum(p.nbytes for _, p in graft.named_parameters(trainable=False))
        info.cls(info.config()).plan_extra(graft)
        assert sum(p.nbytes for _, p in graft.named_parameters(trainable=False)) == 2 * plain
        output(graft.model, torch.ones(2, 7, dtype=torch.int64)).sum().backward()
        with pytest.raises(UsageError, match="ranks for r = 70"):
            info.cls(info.config()).plan_extra(graftwork.attach(tiny.llama(), "lora", r=70))
