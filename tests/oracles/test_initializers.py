"""PiSSA and EVA against peft, against dense linear algebra, and through save and load."""

import pytest
import torch

import graftwork
import tiny
from graftwork.errors import IncompatibleError, UsageError
from graftwork.initializers.eva import PCA
from graftwork.initializers.pissa import randomized_svd


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids).logits


def batches(n=6, rows=4, width=24):
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        ids = torch.randint(0, 10, (rows, width), generator=generator) ** 2 % tiny.VOCAB  # few tokens: separated spectra
        labels = ids.clone()
        labels[:, : width // 4] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def saved_model(tmp_path, storage=None):
    folder = tmp_path / "base"
    if not folder.exists():
        tiny.save(tiny.llama(), folder)
    return graftwork.load(folder, storage=storage, dtype="fp32")[0]


def test_pissa_equals_peft():
    from peft import LoraConfig, get_peft_model

    ours, theirs = tiny.llama(), tiny.llama()
    start = logits(ours)
    graft = graftwork.attach(ours, "lora", r=4, alpha=8, target_modules=["q_proj", "down_proj"], initializer="pissa")
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"))
    for name, adapter in graft.adapters.items():
        layer = peft.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, B @ A, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((adapter.lora_A * A).sum(1).abs(), A.square().sum(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(ours), start, atol=1e-5, rtol=1e-5)
    with graft.disabled():
        assert torch.equal(logits(ours), start)


def test_pissa_trains_like_peft():
    from peft import LoraConfig, get_peft_model

    ours, theirs = tiny.llama(), tiny.llama()
    graft = graftwork.attach(ours, "lora", r=4, target_modules=["v_proj"], initializer="pissa")
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=4, target_modules=["v_proj"], init_lora_weights="pissa"))
    ids = tiny.tokens()
    for model, params in ((ours, graft.parameters()), (peft, [p for p in peft.parameters() if p.requires_grad])):
        optimizer = torch.optim.SGD(params, lr=0.5)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(ours), logits(peft), atol=2e-5, rtol=1e-4)


def test_pissa_exports_as_rank_2r_on_the_pristine_base():
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=3, initializer="pissa", target_modules="attention")
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn(p.shape) * 0.02)
    trained = logits(model)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 6 for _, A in pairs.values())
    fresh = tiny.llama()
    with torch.no_grad():
        for name, (B, A) in pairs.items():
            fresh.get_submodule(name).weight += B @ A
    torch.testing.assert_close(logits(fresh), trained, atol=1e-5, rtol=1e-5)


def test_qpissa_residual_shrinks_and_survives_saving(tmp_path):
    pytest.importorskip("graftwork.storage.nf4")
    plain = saved_model(tmp_path, "nf4")
    source = plain.graft_source
    name = "model.layers.0.mlp.down_proj"
    W = source.read(name + ".weight", dtype=torch.float32)
    errors = [float((W - plain.get_submodule(name).dequantize()).norm())]
    for iterations in (1, 5):
        model = saved_model(tmp_path, "nf4")
        before = logits(model)
        graft = graftwork.attach(model, "lora", r=8, initializer={"method": "pissa", "iterations": iterations})
        adapter = graft.adapters[name]
        used = model.get_submodule(name).dequantize().float() + adapter.lora_B0 @ adapter.lora_A0
        errors.append(float((W - used).norm()))
        with torch.no_grad():
            for p in graft.parameters():
                p.add_(torch.randn(p.shape) * 0.01)
        trained = logits(model)
        graft.save(tmp_path / f"g{iterations}")
        again = saved_model(tmp_path, "nf4")
        loaded = graftwork.attach_saved(again, tmp_path / f"g{iterations}")
        assert torch.equal(logits(again), trained)
        loaded.detach()
        assert torch.equal(logits(again), before)
        with pytest.raises(IncompatibleError):
            graftwork.attach(model, "lora", name="other")
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("initializer", ["pissa", "corda"])
def test_rows_of_a_fused_stored_weight_start_without_requantizing_it(initializer, tmp_path):
    tiny.save(tiny.gpt2(), tmp_path / "base")
    model = graftwork.load(tmp_path / "base", storage="nf4", dtype="fp32")[0]
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    graft = graftwork.attach(model, "lora", r=4, target_modules=["q", "v"], initializer=initializer, batches=batches())
    assert all(site.rows is not None for site in graft.sites.values())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.items() if tensor.dtype == torch.uint8)
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.01)
    trained = logits(model)
    graft.save(tmp_path / "graft")
    again = graftwork.load(tmp_path / "base", storage="nf4", dtype="fp32")[0]
    graftwork.attach_saved(again, tmp_path / "graft")
    assert torch.equal(logits(again), trained)


def test_fast_svd_finds_the_leading_part():
    W = torch.randn(60, 40, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 40, dtype=torch.float64))
    U, S, Vh = randomized_svd(W, 5, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(S[:5], torch.linalg.svdvals(W)[:5], rtol=1e-6, atol=1e-9)
    again = randomized_svd(W, 5, 4, torch.Generator().manual_seed(0))
    assert torch.equal(U, again[0]) and torch.equal(Vh, again[2])


def test_incremental_pca_equals_the_full_one():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(600, 12, generator=generator) @ torch.diag(torch.logspace(1, -2, 12)) + 3.0
    pca = PCA(12)
    for part in rows.split(150):
        pca.update(part, 0.99)
    centred = (rows - rows.mean(0)).double()
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert (pca.components.double() * Vh).sum(1).abs().min() > 0.999
    torch.testing.assert_close(pca.ratio.double(), S**2 / (S**2).sum(), rtol=1e-3, atol=1e-6)


def test_eva_ranks_and_directions_equal_peft():
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    ours, theirs = tiny.llama(), tiny.llama()
    start = logits(ours)
    data = list(batches(1, 16, 40))  # one batch, repeated: both stop at the same data
    graft = graftwork.attach(ours, "lora", r=4, target_modules=["q_proj", "v_proj", "down_proj"], batches=data,
                             initializer={"method": "eva", "rho": 2.0, "tau": 0.99})
    assert torch.equal(logits(ours), start)
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"],
                                             init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.99)))
    initialize_lora_eva_weights(peft, data, show_progress_bar=False)
    ranks = {n: a.r for n, a in graft.adapters.items()}
    assert sum(ranks.values()) == 4 * 6
    theirs_ranks = {n: layer.r["default"] for n, layer in peft.base_model.model.named_modules()
                    if hasattr(layer, "lora_A") and "default" in layer.r}
    assert ranks == theirs_ranks
    for name, adapter in graft.adapters.items():
        assert abs(adapter.scale - 1.0) < 1e-6
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, torch.eye(adapter.r), atol=1e-4, rtol=0)
        first = peft.base_model.model.get_submodule(name).lora_A["default"].weight[0]
        assert (adapter.lora_A[0] * first / first.norm()).sum().abs() > 0.99
    q, v = (graft.adapters[f"model.layers.0.self_attn.{n}_proj"] for n in "qv")
    assert torch.equal(q.lora_A, v.lora_A)


def test_eva_without_redistribution_keeps_ranks_and_whitens():
    data = list(batches())
    plain, white = tiny.llama(), tiny.llama()
    a = graftwork.attach(plain, "lora", r=4, batches=data, initializer={"method": "eva", "rho": 1.0}, target_modules=["k_proj"])
    b = graftwork.attach(white, "lora", r=4, batches=data, initializer={"method": "eva", "rho": 1.0, "whiten": True},
                         target_modules=["k_proj"])
    for name in a.adapters:
        A, W = a.adapters[name].lora_A, b.adapters[name].lora_A
        assert A.shape[0] == 4 and (W.norm(dim=1) != A.norm(dim=1)).any()
        torch.testing.assert_close(W / W.norm(dim=1, keepdim=True), A, atol=1e-5, rtol=1e-4)


def test_eva_reloads_its_ragged_ranks(tmp_path):
    model = saved_model(tmp_path)
    graft = graftwork.attach(model, "lora", r=4, batches=list(batches()), initializer="eva")
    with torch.no_grad():
        for p in graft.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    trained = logits(model)
    graft.save(tmp_path / "graft")
    again = saved_model(tmp_path)
    loaded = graftwork.attach_saved(again, tmp_path / "graft")
    assert {n: a.r for n, a in loaded.adapters.items()} == {n: a.r for n, a in graft.adapters.items()}
    assert torch.equal(logits(again), trained)


def test_refusals():
    with pytest.raises(UsageError, match="needs data"):
        graftwork.attach(tiny.llama(), "lora", initializer="eva")
    with pytest.raises(IncompatibleError, match="starts lora"):
        graftwork.attach(tiny.llama(), "paca", initializer="pissa")
    with pytest.raises(UsageError, match="fewer input rows"):
        graftwork.attach(tiny.llama(), "lora", r=30, initializer="eva", batches=list(batches(1, 1, 4)))
