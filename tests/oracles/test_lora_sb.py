"""LoRA-SB: the start is the best rank-r part of Adam's first full step by autograd in float64, the gradient of R is the nearest one."""

from __future__ import annotations

import json

import pytest
import torch

import graftwork
import tiny
from adapter_support import close, fill, output
from graftwork.errors import UsageError
from graftwork.modeling.protocols import is_conv1d
from graftwork.recipe import load_recipe
from graftwork.training import checkpoint as ckpt
from graftwork.training.schedule import factor
from training_support import completions, folder, recipe, run

IDS = tiny.tokens(2, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]
K = "model.layers.0.self_attn.k_proj"
ETA = 3e-3


def batches(n=3):
    for seed in range(n):
        ids = tiny.tokens(3, 12, seed)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def mean_loss(model, n=3):
    return torch.stack([model(**batch).loss for batch in batches(n)]).mean()


def full_gradients(model, names, n=3):
    """Mean gradient of whole weights by autograd, (out, in)."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    grads = torch.autograd.grad(mean_loss(model, n), weights)
    return {name: g.T if is_conv1d(model.get_submodule(name)) else g for name, g in zip(names, grads, strict=True)}


def start(model, r=4, n=3, targets=TARGETS, eta=ETA, **options):
    return graftwork.attach(model, "lora_sb", r=r, target_modules=targets, batches=batches(n),
                            initializer={"method": "lora_sb", "eta": eta, **options})


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_start_is_the_best_part_of_the_first_full_step(kind):
    model, twin = tiny.ALL[kind]().double(), tiny.ALL[kind]().double()
    graft = start(model, targets=TARGETS if kind == "llama" else "all-linear", niter=150)
    gradients = full_gradients(twin, list(graft.adapters))
    for name, adapter in graft.adapters.items():
        step = -ETA * gradients[name].sign()
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        r = adapter.r
        # fp32 may turn the sign of an entry that is almost zero
        close((adapter.B @ adapter.M @ adapter.A).detach(), U[:, :r] * S[:r] @ Vh[:r], 2e-3)
        torch.testing.assert_close(adapter.M.detach().double(), torch.diag(S[:r]), atol=1e-3 * float(S[0]), rtol=0)
        for Q in (adapter.B.T, adapter.A):
            torch.testing.assert_close(Q @ Q.T, torch.eye(r), atol=1e-5, rtol=0)
            assert not Q.requires_grad


@pytest.mark.parametrize("initialized", [True, False])
def test_the_gradient_of_R_is_the_nearest_to_the_full_one(initialized):
    model = tiny.llama().double()
    graft = start(model) if initialized else graftwork.attach(model, "lora_sb", r=4, target_modules=TARGETS)
    merged = tiny.llama().double()
    for name, adapter in graft.adapters.items():
        adapter.double()
        adapter.A.data = torch.linalg.qr(adapter.A.data.T).Q.T.contiguous()
        adapter.B.data = torch.linalg.qr(adapter.B.data).Q.contiguous()
        merged.get_submodule(name).weight.data += (adapter.B @ adapter.M @ adapter.A).detach()
    gradients = full_gradients(merged, list(graft.adapters))
    mean_loss(model).backward()
    generator = torch.Generator().manual_seed(0)
    for name, adapter in graft.adapters.items():
        G, B, A, dR = gradients[name], adapter.B, adapter.A, adapter.M.grad
        close(B @ dR @ A, B @ B.T @ G @ A.T @ A, 1e-9)
        # least squares over all X, by the normal equations of vec(B X A) = kron(B, A^T) vec(X)
        best = torch.linalg.lstsq(torch.kron(B, A.T.contiguous()), G.reshape(-1, 1)).solution.reshape(4, 4)
        close(dR, best, 1e-8)
        other = dR + 0.1 * dR.norm() * torch.randn(4, 4, generator=generator, dtype=dR.dtype)
        assert (G - B @ dR @ A).norm() < (G - B @ other @ A).norm()


def test_the_start_is_a_step_down_and_follows_the_full_gradient():
    """The first change of the weights, and the first step of R, against autograd's full gradient: better than random directions."""
    bare = float(mean_loss(tiny.llama().double()).detach())
    found = {}
    for initialized in (True, False):
        model = tiny.llama().double()
        graft = start(model) if initialized else graftwork.attach(model, "lora_sb", r=4, target_modules=TARGETS)
        loss = mean_loss(model)
        loss.backward()
        gradients = full_gradients(tiny.llama().double(), list(graft.adapters))
        found[initialized] = [cosine((a.B @ a.M.grad @ a.A).double(), gradients[n]) for n, a in graft.adapters.items()]
        if initialized:
            assert float(loss.detach()) < bare
            for name, adapter in graft.adapters.items():
                change = (adapter.B @ adapter.M @ adapter.A).detach().double()
                assert cosine(change, -gradients[name]) > 0.3, name
        else:
            assert float(loss.detach()) == pytest.approx(bare, rel=1e-6)
    assert min(found[True]) > max(0.3, 2 * max(found[False])), found


@pytest.mark.slow
def test_it_learns_no_worse_than_lora_xs():
    losses = {}
    for method in ("lora_sb", "lora_xs"):
        model = tiny.llama().train()
        graft = start(model, targets="all-linear", eta=1e-3) if method == "lora_sb" else graftwork.attach(model, "lora_xs", r=4)
        optimizer = torch.optim.Adam(graft.parameters(), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss = mean_loss(model)
            loss.backward()
            optimizer.step()
        losses[method] = float(loss.detach())
    assert losses["lora_sb"] < losses["lora_xs"], losses


def test_options():
    def adapter(**options):
        return start(tiny.llama(), **options).adapters[K]

    one = adapter()
    close(adapter(eta=2 * ETA).M.detach(), 2 * one.M.detach(), 1e-5)
    assert torch.equal(adapter(eta=0.0).M, torch.zeros(4, 4))
    assert not torch.allclose(adapter(batches=1).B, one.B)
    kept = [float(adapter(niter=n).M.detach().norm()) for n in (0, 10)]
    assert kept[0] < 0.99 * kept[1]
    graft = graftwork.attach(tiny.llama(), "lora_sb", r=5, rank_pattern={"k_proj": 3})
    narrow = sum(n.endswith("k_proj") for n in graft.adapters)
    assert graft.parameter_count() == 25 * (len(graft.adapters) - narrow) + 9 * narrow


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@torch.no_grad()
def test_export_and_file(storage, tmp_path):
    model = graftwork.load(folder(tmp_path), storage=storage, dtype="fp32")[0]
    graft = start(model, targets="all-linear")
    fill(graft, size=0.02)
    learned = output(model, IDS)
    pairs, error = graft.to_lora()
    assert error == 0 and all(A.shape[0] == 4 for _, A in pairs.values())
    graft.save(tmp_path / "saved")
    fresh = graftwork.load(folder(tmp_path), storage=storage, dtype="fp32")[0]
    again = graftwork.attach_saved(fresh, tmp_path / "saved")
    assert torch.equal(output(fresh, IDS), learned)
    assert torch.equal(again.adapters[K].A, graft.adapters[K].A)
    assert json.loads((tmp_path / "saved" / "graft.json").read_text())["initializer"]["eta"] == ETA


@torch.no_grad()
def test_a_checkpoint_holds_the_directions(tmp_path):
    """A resumed run does its gradient pass again; if that comes out otherwise, R must not be read in its directions."""
    model, other = tiny.llama(), tiny.llama()
    graft, resumed = fill(start(model)), start(other, n=1)
    assert not torch.allclose(output(other, IDS), output(model, IDS), atol=1e-3)
    ckpt.write(tmp_path / "c", learned=ckpt.learned_tensors(model, list(graft.named_parameters()), [graft]), optimizer={}, parts={},
               progress={}, trainer_state="{}")
    ckpt.restore_learned(tmp_path / "c", other, list(resumed.named_parameters()), [resumed])
    assert torch.equal(output(other, IDS), output(model, IDS))


def test_slices_take_their_rows_of_the_gradient():
    graft = start(tiny.gpt2().double(), targets="q,v", niter=150)
    gradients = full_gradients(tiny.gpt2().double(), {s.module_name: 0 for s in graft.sites.values()})
    for name, adapter in graft.adapters.items():
        U, S, Vh = torch.linalg.svd(-ETA * gradients[graft.sites[name].module_name][graft.sites[name].rows].sign())
        close((adapter.B @ adapter.M @ adapter.A).detach(), U[:, :4] * S[:4] @ Vh[:4], 2e-3)


def test_refusals():
    with pytest.raises(UsageError, match="r=33.*k_proj.*allows 32"):
        graftwork.attach(tiny.llama(), "lora_sb", r=33)
    with pytest.raises(UsageError, match="outside a run its rate is not known"):
        start(tiny.llama(), eta=None)
    with pytest.raises(UsageError, match="needs data"):
        graftwork.attach(tiny.llama(), "lora_sb", r=4, initializer={"method": "lora_sb", "eta": ETA})
    with pytest.raises(UsageError, match="lora_sb reads.*fused experts"):
        start(tiny.mixtral(), targets="all-linear")
    with pytest.raises(graftwork.GraftworkError, match="starts lora_sb, not"):
        graftwork.attach(tiny.llama(), "lora", batches=batches(), initializer={"method": "lora_sb", "eta": ETA})


def test_a_recipe_takes_the_start_by_itself(tmp_path):
    plain = {"model": "m", "data": "d", "adapter": "lora_sb"}
    made = load_recipe(plain)
    assert made.initializer.method == "lora_sb" and load_recipe(made.document()).document() == made.document()
    off = load_recipe({**plain, "initializer": "default"})
    assert off.initializer is None and load_recipe(off.document()).initializer is None
    assert load_recipe({**plain, "adapter": "lora"}).initializer is None


@pytest.mark.slow
def test_a_run_gives_its_first_rate_and_is_planned(tmp_path):
    base, data = folder(tmp_path), completions(tmp_path / "d.jsonl")
    document = recipe(base, data, tmp_path / "run", adapter={"method": "lora_sb", "r": 4}, train={"warmup": 2})
    plan = graftwork.plan(document, estimate_time=False)
    done = run(document)
    (graft,) = done.grafts
    assert graft.initializer["eta"] == pytest.approx(1e-2 * factor(0, 6, 2, "cosine")) == pytest.approx(1e-2 / 3)
    assert plan.trained == graft.parameter_count() and done.loss > 0
    assert plan.categories["adapters"] == sum(p.nbytes for _, p in graft.named_parameters(trainable=False))
