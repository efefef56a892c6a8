"""S2-LoRA: the closed form, shared gradients as sums over unshared copies, exact zeros, and the count by shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.errors import UsageError

IDS = tiny.tokens(2, 7)


def test_gradients_are_sums_over_unshared_copies():
    """dA = sum_k diag(c_k) dA_k of LoRAs with copies of their own, dlambda_k from the same; through peft-shaped twins of ours."""
    model, twin = tiny.llama(), tiny.llama()
    graft = attach(model, "s2_lora", threshold=0.0, l1=0.0)
    copies = graftwork.attach(twin, "lora", r=12)
    with torch.no_grad():
        for name, adapter in graft.adapters.items():
            A, B = adapter.borrowed()
            copies.adapters[name].lora_A.copy_(adapter.lambda_[:, None] * A)
            copies.adapters[name].lora_B.copy_(B)
    ours, theirs = output(model, IDS), output(twin, IDS)
    close(ours, theirs, 1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    sums = {}
    for name, adapter in graft.adapters.items():
        own = copies.adapters[name]
        A, _ = adapter.borrowed()
        dA, dB = sums.get(adapter.shape, (0.0, 0.0))
        sums[adapter.shape] = dA + adapter.lambda_.detach()[:, None] * own.lora_A.grad, dB + own.lora_B.grad
        close(adapter.lambda_.grad, (own.lora_A.grad * A.detach()).sum(1), 1e-3)
    assert len(sums) == 4, "q and o; k and v; gate and up; down"
    for shape, (dA, dB) in sums.items():
        close(graft.shared.A[shape].grad, dA, 1e-3)
        close(graft.shared.B[shape].grad, dB, 1e-3)


def test_count_by_shape():
    graft = graftwork.attach(tiny.llama(), "s2_lora", r=5)
    shapes = {(a.out_features, a.in_features) for a in graft.adapters.values()}
    assert graft.parameter_count() == 5 * sum(o + i for o, i in shapes) + 5 * len(graft.adapters)
    assert sum(p.numel() for g in graft.parameter_groups() for p in g["params"]) == graft.parameter_count()
    # the number of the paper's setting: 144 projections of 768 x 768 at rank 32
    cls = type(next(iter(graft.adapters.values())))
    config = graft.config.model_copy(update={"r": 32})
    sites = [SimpleNamespace(name=str(i), in_features=768, out_features=768) for i in range(144)]
    pool = cls.make_shared(sites, config, 0)
    assert sum(p.numel() for p in pool.parameters()) + sum(cls.parameter_count(s, config) for s in sites) == 53_760


def test_zeros_are_exact_and_leave_the_lora():
    model = tiny.llama()
    graft = attach(model, "s2_lora", r=4, threshold=0.05)
    (name, adapter), *_ = graft.adapters.items()
    with torch.no_grad():
        adapter.lambda_.copy_(torch.tensor([0.3, -0.04, 0.05, -0.2]))
        assert adapter.coefficients().tolist() == pytest.approx([0.3, 0.0, 0.0, -0.2]) and adapter.coefficients()[1] == 0.0
        live = output(model, IDS)
        pairs, error = graft.to_lora()
        A, B = adapter.borrowed()
        assert error == 0.0 and pairs[name][1].shape == (2, 64)
        torch.testing.assert_close(pairs[name][0] @ pairs[name][1], B @ torch.diag(adapter.coefficients()) @ A)
        with graftwork.routing(model, ["a", "a"]):
            close(output(model, IDS), live, 1e-5)
    output(model, IDS).square().mean().backward()
    assert adapter.lambda_.grad.abs().min() > 0, "a coefficient under the threshold can come back"
    graft.detach()
    empty = graftwork.attach(model, "s2_lora", r=4)
    assert all(pair[1].shape[0] == 1 and not pair[1].any() for pair in empty.to_lora()[0].values())


@pytest.mark.slow
def test_l1_is_in_the_loss_and_makes_zeros(tmp_path):
    """Through the trainer: a strong penalty brings nearly all coefficients under the threshold, none does not."""
    import training_support as support

    model, file = support.folder(tmp_path), support.completions(tmp_path / "rows.jsonl")
    share = {}
    for l1 in (0.0, 5.0):
        run = support.run(support.recipe(model, file, tmp_path / f"l1-{l1}", adapter={
            "method": "s2_lora", "r": 4, "l1": l1, "threshold": 2e-2}, train={"max_steps": 8}))
        saved = graftwork.attach_saved(tiny.llama(), run.graft, allow_zero=True)
        zero = torch.cat([a.coefficients().detach() == 0 for a in saved.adapters.values()])
        share[l1] = zero.float().mean().item()
    assert share[5.0] > 0.9 > share[0.0] + 0.2, share


def test_rates_bank_and_bounds():
    model = tiny.llama()
    graft = fill(graftwork.attach(model, "s2_lora", r=4, shared_lr_scale=0.25))
    rates = {n: g["lr_scale"] for g in graft.parameter_groups() for n in g["names"]}
    assert all(rate == (0.25 if n.startswith("shared.") else 1.0) for n, rate in rates.items()) and len(set(rates.values())) == 2
    with torch.no_grad(), graftwork.routing(model, ["default", None]):
        before = output(model, IDS)
        for p in graft.shared.parameters():
            p.mul_(2.0)
        assert not torch.allclose(output(model, IDS)[0], before[0]), "a kept bank follows the shared pair"
    with pytest.raises(UsageError, match="rank 33.*32 x 64"):
        graftwork.attach(tiny.llama(), "s2_lora", r=33)
    with pytest.raises(UsageError, match="one rank"):
        graftwork.attach(tiny.llama(), "s2_lora", r=4, ranks={"model.layers.0.self_attn.q_proj": 2})
