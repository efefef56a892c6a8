"""Q-GaLore: the quantizer and the projector of q-galore-torch where it is installed, closed forms of bytes, laziness and INT8 training."""

import math

import pytest
import torch

import tiny
from graftwork.errors import UsageError
from graftwork.modeling.affine import dequantize_affine, quantize_affine
from graftwork.modeling.trained_codes import codes_of
from graftwork.optim import load_optimizer_state, optimizer, optimizer_state_tensors
from graftwork.registry import lookup, make_config
from graftwork.storage.base import apply_storage, dense_state, make_storage, train_weights


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the quantizer -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits, group", [(8, 256), (4, 256), (8, 64), (4, 32)])
def test_quantizer_is_the_published_formula(bits, group):
    """Equal to the reference's on groups with both signs; its zero point is cut to the codes, which only they survive."""
    x, top = draw(48, 64), 2**bits - 1
    codes, scale, zero = quantize_affine(x, bits, group)
    parts = x.reshape(-1, group)
    s = (parts.amax(1) - parts.amin(1)) / top
    z = (-torch.round(parts.amin(1) / s)).clamp(0, top)
    expected = (torch.round(parts / s[:, None]) + z[:, None]).clamp(0, top)
    assert torch.equal(scale, s) and torch.equal(zero, z) and codes.numel() == x.numel() * bits // 8
    values = dequantize_affine(codes, scale, zero, x.numel(), bits, group).view_as(parts)
    assert torch.equal(values, (expected - z[:, None]) * s[:, None])
    assert ((values - parts).abs() <= 1.001 * s[:, None]).all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantizer_equals_the_reference_package(bits):
    projector = pytest.importorskip("q_galore_torch.q_galore_projector").GaLoreProjector(4)
    x = draw(64, 128, seed=3)
    theirs, scales, zeros, _ = projector._quantize(x, 256, bits)
    codes, scale, zero = quantize_affine(x, bits, 256)
    ours = codes if bits == 8 else torch.stack([codes >> 4, codes & 15], 1).flatten()
    assert torch.equal(ours, theirs.flatten()) and torch.equal(scale, scales.flatten()) and torch.equal(zero, zeros.flatten())


def test_groups_that_the_reference_ruins():
    for x in (0.5 + 0.01 * draw(1000), -3.0 + 1e-4 * draw(1000), torch.full((300,), 0.7), torch.zeros(257), 1e-9 * draw(300), draw(5)):
        values = dequantize_affine(*quantize_affine(x), x.numel())
        spread = x.max() - x.min()
        assert (values - x).abs().max() <= spread / 255 + 1e-6 * x.abs().max()
    assert torch.equal(dequantize_affine(*quantize_affine(torch.full((300,), -0.7)), 300), torch.full((300,), -0.7))


@pytest.mark.slow
def test_updates_of_a_twentieth_of_a_code():
    """100 updates of 0.05 codes: rounding to the nearest moves nothing, stochastic rounding 5 codes in the mean."""
    start, generator, moved = draw(64, 256).clamp(-2, 2), torch.Generator().manual_seed(1), {}
    start[:, 0], start[:, -1] = -4.0, 4.0  # so that updates do not change the scale of a row
    for rounding, own in (("nearest", None), ("stochastic", generator)):
        kept = make_storage(start, "int8", make_config("storage", "int8"))
        for _ in range(2):  # extremes that lie between two codes move by half of one, once
            kept.write(kept.read())
        first, step = kept.read(), 0.05 * kept.leaves()["scale"].mean()
        for _ in range(100):
            values = kept.read()
            values[:, 1:-1] += step
            kept.write(values, own)
        moved[rounding] = ((kept.read() - first)[:, 1:-1] / step * 0.05).mean().item()
    assert moved["stochastic"] == pytest.approx(5.0, abs=0.1) and moved["nearest"] == 0.0


def test_projection_in_four_bits():
    """Of a 512 x 64 orthonormal basis: error about 0.11, distance from orthonormal about 0.06 (reference, measured)."""
    basis = torch.linalg.qr(draw(512, 64))[0].T.contiguous()
    codes, scale, zero = quantize_affine(basis, 4, 256)
    values = dequantize_affine(codes, scale, zero, basis.numel(), 4, 256).view_as(basis)
    assert codes.numel() == basis.numel() // 2
    assert ((values - basis).norm() / basis.norm()).item() == pytest.approx(0.11, abs=0.015)
    assert ((values @ values.T - torch.eye(64)).norm() / 8).item() == pytest.approx(0.06, abs=0.03)


# -- the optimizer -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_equals_galore_on_the_reference_projector(shape):
    """Adam on what q-galore-torch's projector gives, over three refreshes, with float moments. For wide matrices it groups P (a, r)
    row by row, and here the r vectors: the same formula, other groups."""
    kind = pytest.importorskip("q_galore_torch.q_galore_projector").GaLoreProjector

    class Projector(kind):
        def get_orthogonal_matrix(self, weights, rank, type):
            found = super().get_orthogonal_matrix(weights, rank, type)
            if type == "left":
                codes, scales, zeros, _ = self._quantize(found.T.contiguous(), 64, 4)
                found, self.quant = ((codes - zeros) * scales).view(rank, -1).T, False
            return found

    projector = Projector(8, update_proj_gap=3, scale=0.25, quant=True, group_size=64, n_bit=4)
    p = torch.nn.Parameter(draw(*shape))
    mine = optimizer("q_galore", [p], lr=1e-2, rank=8, update_proj_gap=3, quant_group_size=64, state="dense", eps=1e-12,
                     cos_threshold=None)
    w = p.detach().clone()
    m = v = 0.0
    for step in range(8):
        p.grad = draw(*shape, seed=10 + step)
        low = projector.project(p.grad, step)
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low.square()
        w = w - 1e-2 * projector.project_back((m / (1 - 0.9 ** (step + 1))) / (v / (1 - 0.999 ** (step + 1))).sqrt())
        mine.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-4, atol=1e-5)


def refreshes(steps, seeds=lambda step: 0, shape=(40, 24), **options):
    """At which steps the SVD ran."""
    from graftwork.optim import quantized

    p, at, kept = torch.nn.Parameter(torch.zeros(shape)), [], quantized.top_vectors
    built = optimizer("q_galore", [p], rank=4, update_proj_gap=4, **options)
    quantized.top_vectors = lambda *a: at.append(step) or kept(*a)
    try:
        for step in range(steps):
            u, v = draw(shape[0], 4, seed=seeds(step)), draw(4, shape[1], seed=1 + seeds(step))
            p.grad = u @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ v + 1e-3 * draw(*shape, seed=2 + step)
            built.step()
    finally:
        quantized.top_vectors = kept
    return at, built.state[p]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"similarity": "cosine"}, {"projection": "dense"}])
def test_frozen_subspace_is_refreshed_log2_times(options):
    at, state = refreshes(400, **options)
    assert at == [0, 4, 8, 12, 16, 20, 24, 32, 64, 128, 256] and state["refresh_gap"] == 256
    assert len(at) == 6 + math.ceil(math.log2(400 / 4) - 2)
    assert state["similarities"].mean() > 0.95
    assert ("first_vector" in state) == ("similarity" in options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cos_threshold": None}, {"cos_threshold": 2.0}, {"gamma_proj": 1.0}])
def test_gap_that_does_not_grow(options):
    at, state = refreshes(60, **options)
    assert at == list(range(0, 60, 4)) and ("similarities" in state) == (options.get("cos_threshold", 0) is not None)


@pytest.mark.slow
def test_turning_subspace_and_the_options_of_the_queue():
    at, state = refreshes(60, seeds=lambda step: 100 * step)
    assert at == list(range(0, 60, 4)) and state["similarities"].abs().max() < 0.4  # unrelated: 0 in the mean, not r / a
    assert refreshes(60, queue_size=1)[0] == [0, 4, 8, 16, 32]
    assert refreshes(60, queue_size=1, gamma_proj=3.0)[0] == [0, 4, 12, 36]


def test_overlap_ignores_signs_and_order():
    from graftwork.optim.base import Clock
    from graftwork.optim.quantized import LazySubspace

    stage = LazySubspace(4, 1, randomized=False, group=None, similarity="overlap", threshold=0.4, growth=2.0, queue=5)
    rows = torch.linalg.qr(draw(24, 4))[0].T
    state = {"projection_right": rows, "similarities": torch.zeros(5)}
    same = stage._similar(-rows.flip(0), state, torch.zeros(40, 24), Clock(1, 0, 0))
    other = stage._similar(torch.linalg.qr(torch.cat([rows, draw(4, 24)]).T)[0].T[4:], state, torch.zeros(40, 24), Clock(1, 0, 0))
    assert same.item() == pytest.approx(1.0) and other.item() == pytest.approx(-0.2, abs=1e-4)  # orthogonal: -(r/a) / (1 - r/a)


def test_state_bytes_are_the_formula():
    size, (b, a, r) = lookup("optimizer", "q_galore").cls.state_bytes, (1536, 576, 64)
    moments, clock = 2 * b * r + 8 * -(-b * r // 256), 4 + 8 + 4 * 5
    assert size((b, a), torch.bfloat16, rank=r) == a * r // 2 + 8 * a * r // 256 + moments + clock == size((a, b), rank=r)
    assert size((b, a), rank=r, projection="dense", cos_threshold=None) == 4 * a * r + moments + 4
    assert size((b, a), rank=r, similarity="cosine") == size((b, a), rank=r) + 4 * a
    assert size((b, a), rank=r, state="dense", queue_size=9) == a * r // 2 + 8 * a * r // 256 + 8 * b * r + clock + 16
    assert size((b, a), rank=r, quant_group_size=128) == size((b, a), rank=r) + 8 * a * r // 256
    assert size((b, a), rank=r) < 0.26 * lookup("optimizer", "galore").cls.state_bytes((b, a), rank=r)


# -- INT8 weights ------------------------------------------------------------------------------------------------------------
def coded_model(name="llama"):
    model = apply_storage(tiny.ALL[name](), make_config("storage", "int8"))
    train_weights(model)
    return model


def steps(model, built, count, first=0):
    losses = []
    for step in range(first, first + count):
        ids = tiny.tokens(seed=step % 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        built.step()
        built.zero_grad()
        losses.append(loss.item())
    return losses


def test_gradients_are_those_of_the_dense_weight():
    kept = make_storage(draw(24, 40), "int8", make_config("storage", "int8"), bias=draw(24))
    weight, dense, x = kept.train_weight(), kept.dequantize().requires_grad_(), draw(3, 5, 40, seed=1).requires_grad_()
    y = torch.nn.functional.linear(x, dense, kept.bias)
    expected = torch.autograd.grad(y, (dense, x), draw(3, 5, 24, seed=2))
    for _ in range(2):  # and they add up over micro-batches
        kept(x).backward(draw(3, 5, 24, seed=2))
    torch.testing.assert_close(weight.grad, 2 * expected[0])
    torch.testing.assert_close(x.grad, 2 * expected[1])
    weight.requires_grad_(False)
    weight.grad = None
    kept(x).sum().backward()
    assert weight.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_float_weight_between_steps(name):
    model = coded_model(name)
    built = optimizer("q_galore", model, lr=5e-3, rank=8, update_proj_gap=4)
    losses = steps(model, built, 12)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    coded = [p for p in model.parameters() if codes_of(p) is not None]
    weights = sum(p.numel() for p in coded)
    groups = sum(-(-p.numel() // 256) for p in coded)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for p in coded for t in (p, *codes_of(p).parts().values())}
    assert sum(held.values()) == weights + 8 * groups + 4 * len(coded)
    assert all(torch.isnan(p).all() and p.grad is None for p in coded)  # who reads the stand-in learns it
    linear = [p for group in built.param_groups if group["role"] == "linear" for p in group["params"]]
    assert len(linear) == len(coded) and all(built.state[p]["exp_avg"].numel() < p.numel() for p in linear)


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("q_galore", {"rank": 8, "update_proj_gap": 2}), ("adamw8bit", {"rounding": "stochastic"}),
                                             ("adamw", {}), ("sgd", {"lr": 0.1}), ("q_galore", {"rank": 8, "fused": True})])
def test_any_optimizer_moves_codes(method, options):
    finals = []
    for _ in range(2):
        model = coded_model()
        losses = steps(model, optimizer(method, model, **{"lr": 5e-3, **options}), 9)
        assert losses[-1] < losses[0]
        finals.append(torch.cat([w.flatten() for w in dense_state(model).values()]))
    assert torch.equal(*finals)


@pytest.mark.slow
def test_resume_is_bit_exact():
    def names(model):
        return {p: n for n, p in model.named_parameters() if p.requires_grad}

    model, other = coded_model(), coded_model()
    options = {"lr": 5e-3, "rank": 8, "update_proj_gap": 2, "queue_size": 1, "min_8bit_size": 64}
    built = optimizer("q_galore", model, **options)
    steps(model, built, 5)
    tensors, header = optimizer_state_tensors(built, names(model))
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    again = optimizer("q_galore", other, **options)
    load_optimizer_state(again, {k: v.clone() for k, v in tensors.items()}, header, names(other))
    steps(model, built, 4, first=5)
    steps(other, again, 4, first=5)
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert"])
def test_trained_codes_saved_dense_are_the_same_model(name):
    model, plain = coded_model(name), tiny.ALL[name]()
    before = {n: t.clone() for n, t in dense_state(model).items()}
    built = optimizer("q_galore", model, lr=5e-3, rank=4)
    for seed in range(2):
        model(input_ids=tiny.tokens(seed=seed))[0].square().mean().backward()
        built.step()
    after = dense_state(model)
    assert after.keys() == plain.state_dict().keys() and any(not torch.equal(before[n], t) for n, t in after.items() if t.dim() > 1)
    plain.load_state_dict(after)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny.tokens())[0], plain(input_ids=tiny.tokens())[0], rtol=1e-4, atol=2e-5)


def test_casts_and_files_leave_the_stand_in_alone():
    kept = make_storage(draw(24, 40), "int8", make_config("storage", "int8"))
    weight, dense = kept.train_weight(), kept.dequantize()
    assert kept.train_weight() is weight and set(kept.state_dict()) == {"codes", "scale", "zero"}
    weight.grad = torch.ones(24, 40)
    kept.to(torch.bfloat16)
    assert kept.weight is weight and weight.dtype == weight.grad.dtype == torch.bfloat16 and weight.untyped_storage().nbytes() == 2
    assert torch.equal(kept.dequantize(), dense.bfloat16()) and kept.bits_per_weight == 8 + 64 * 4 / 960
    kept.load_state_dict(make_storage(-draw(24, 40), "int8", make_config("storage", "int8")).state_dict())
    assert (kept.read() + draw(24, 40)).abs().max() < 0.05 and kept.weight is weight


def test_group_size_buys_precision_with_bits():
    errors = {}
    for group in (16, 64, 256, 1000):
        kept = make_storage(draw(24, 40), "int8", make_config("storage", "int8", group_size=group))
        assert kept.bits_per_weight == 8 + 64 * -(-960 // group) / 960
        errors[group] = (kept.read() - draw(24, 40)).norm().item()
    assert errors[16] < errors[64] < errors[256] < errors[1000]
    for bad in (0, 8):
        with pytest.raises(UsageError, match="group_size"):
            make_config("storage", "int8", group_size=bad)


def test_what_codes_refuse():
    import copy

    kept = make_storage(draw(8, 16), "int8", make_config("storage", "int8"))
    weight = kept.train_weight()
    with pytest.raises(UsageError, match="kahan"):
        optimizer("adamw", [weight], rounding="kahan")
    with pytest.raises(UsageError, match="frozen codes"):
        make_storage(draw(8, 16), "nf4", make_config("storage", "nf4")).train_weight()
    with pytest.raises(UsageError, match="copy"):
        copy.deepcopy(kept)(draw(2, 16))
    with pytest.raises(UsageError, match="no leaf"):
        kept.dequantize({"absmax": torch.zeros(1)})


# -- whole runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run_resumes_to_the_same_codes_and_saves_a_dense_model(tmp_path):
    import shutil

    import transformers

    from graftwork.training import checkpoint as ckpt
    from training_support import completions, folder, recipe, run, tensors_of

    base, rows = folder(tmp_path), completions(tmp_path / "rows.jsonl")
    document = recipe(base, rows, tmp_path / "o", adapter=None, storage="int8", train={"save_steps": 2, "max_steps": 4},
                      optimizer={"method": "q_galore", "lr": 5e-3, "rank": 8, "update_proj_gap": 2, "min_8bit_size": 64})
    done = run(document)
    out = tmp_path / "o"
    whole, last = tensors_of(out / "model"), tensors_of(ckpt.complete(out)[-1])
    dense = dense_state(done.model)
    again = transformers.AutoModelForCausalLM.from_pretrained(done.graft)
    assert all(torch.equal(p, dense[n]) for n, p in again.named_parameters())
    assert not any(n.endswith(".q_proj.weight") and n.startswith("learned") for n in last)
    codes = [t for n, t in last.items() if n.endswith("q_proj.codes")]
    assert codes and all(t.dtype == torch.uint8 for t in codes)
    shutil.rmtree(out / "model")
    for step in ckpt.complete(out)[1:]:
        shutil.rmtree(step)
    run(document, resume=True)
    resumed = tensors_of(out / "model")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    before = tensors_of(base)
    moved = [k for k in before if k in whole and "proj" in k and not torch.equal(before[k], whole[k])]
    assert len(moved) == 14


@pytest.mark.slow
def test_plan_counts_codes_scales_and_projections(tmp_path):
    from graftwork.planning.simulate import plan
    from training_support import completions, folder, recipe

    base, rows = folder(tmp_path), completions(tmp_path / "rows.jsonl")
    optimizer_ = {"method": "q_galore", "rank": 8, "fused": True}
    figures = {storage: plan(recipe(base, rows, tmp_path / "o", adapter=None, storage=storage, optimizer=optimizer_,
                                    train={"max_grad_norm": 0}), device="cpu") for storage in ("dense", "int8")}
    model = coded_model()
    coded = [p for p in model.parameters() if codes_of(p) is not None]
    saved = sum(4 * p.numel() - p.numel() - 8 * -(-p.numel() // 256) - 4 for p in coded)
    assert figures["dense"].categories["weights"] - figures["int8"].categories["weights"] == saved
    assert figures["dense"].trained == figures["int8"].trained
    size = lookup("optimizer", "q_galore").cls.state_bytes
    state = sum(size(p.shape, rank=8) for p in coded) + sum(
        size(p.shape, role="other") for p in model.parameters() if p.is_floating_point() and codes_of(p) is None)
    assert figures["int8"].categories["optimizer_state"] == figures["dense"].categories["optimizer_state"] <= state
    assert figures["int8"].peak_bytes < figures["dense"].peak_bytes
