"""HALO: exact Hadamard matrices and integer products, autograd with an identity quantizer, the card's errors with outliers, saved bytes,
adapters in high precision, an untouched model, and the order of the levels on a small language model."""

import copy

import numpy as np
import pytest
import torch

import graftwork
import tiny
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError, UsageError
from graftwork.estimators._hadamard import block_of, factors, matrix, padded, rotate
from graftwork.estimators._rotated import FORMATS, Mode, Rotated
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.estimators.halo import HALO, HALOEstimator, low_precision
from graftwork.modeling.protocols import product_of
from graftwork.modeling.state import state_of
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.recipe import load_recipe
from graftwork.registry import make_config
from graftwork.storage.base import apply_storage
from graftwork.training.step import TrainStep
from training_support import completions, folder, recipe, run

LEVELS = (0, 1, 2)


class Exact:
    """Codes are the values."""

    def quantize(self, x):
        return x, torch.ones((), dtype=x.dtype)

    def product(self, a, b):
        return a @ b


def batch_of(seed=0, lengths=(8, 7)):
    rows = [tiny.tokens(1, n, seed + n)[0].tolist() for n in lengths]
    return Collator(0).collate([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])


def built(config, model=None, graft=None, lr=1e-3):
    model = model or tiny.llama().requires_grad_(True)
    estimator = BackpropEstimator(Backprop()) if config is None else HALOEstimator(config)
    parameters = list((graft or model).named_parameters())
    made = graftwork.optimizer("adamw", graft.parameters() if graft else model, lr=lr)
    return TrainStep(model.train(), CausalLMObjective(), estimator, parameters, [graft] if graft else [], (), made, 0.0, (), 100, 1)


def gradients(step, batches=None):
    result = step.compute(batches or [batch_of()], 0)
    found = {n: p.grad for n, p in step.parameters if p.grad is not None}
    for _, p in step.parameters:
        p.grad = None
    return result.loss, found


def error(a, b):
    return float(((a - b).norm() / b.norm()).detach())


# -- the rotation ----------------------------------------------------------------------------------------------------
def test_hadamard_matrices_and_rotations_of_many_widths():
    for order in (1, 2, 8, 12, 20, 28, 36, 44, 60, 76, 84, 108, 140):
        H = matrix(order)
        assert np.array_equal(H @ H.T, order * np.eye(order)) and set(np.unique(H)) <= {-1, 1}
    with pytest.raises(ValueError, match="92"):
        matrix(92)
    assert {n: block_of(n) for n in (576, 1536, 896, 4864, 14336, 11008, 10, 7)} == {
        576: 576, 1536: 1536, 896: 896, 4864: 4864, 14336: 14336, 11008: 256, 10: 2, 7: 1}
    assert [padded(n) for n in (1, 3, 5, 9, 13, 70, 2047)] == [1, 4, 8, 12, 16, 72, 2048]
    source = torch.Generator().manual_seed(0)
    for width in (96, 64, 1536, 24, 344):
        x = torch.randn(3, width, generator=source, dtype=torch.float64)
        H = np.ones((1, 1))
        for order in factors(width):
            H = np.kron(H, matrix(order))
        H = torch.from_numpy(np.kron(np.eye(width // len(H)), H) / len(H) ** 0.5)
        torch.testing.assert_close(rotate(x), x @ H)
        torch.testing.assert_close(rotate(x, transpose=True), x @ H.T)
        torch.testing.assert_close(rotate(rotate(x), transpose=True), x)


# -- one map ---------------------------------------------------------------------------------------------------------
def test_integer_products_are_exact_and_codes_are_the_nearest():
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, generator=source, dtype=torch.int8) for shape in ((17, 2500), (2500, 24)))
    a[0], b[:, 0] = 127, 127  # the largest sum there is
    exact = a.long() @ b.long()
    assert torch.equal(FORMATS["int8"].product(a, b).long(), exact)
    assert torch.equal(FORMATS["int8"].product(a[:, :1040], b[:1040]).long(), a[:, :1040].long() @ b[:1040].long())
    assert torch.equal(torch._int_mm(a, b).long(), exact)
    x = torch.randn(40, 30, generator=source)
    for name, top, steps in (("int8", 127, 0.5), ("fp8", 448, 16)):
        codes, scale = FORMATS[name].quantize(x)
        assert codes.element_size() == 1 and float(scale) == pytest.approx(float(x.abs().max()) / top)
        assert float((codes.float() * scale - x).abs().max()) <= steps * float(scale) * 1.001
    assert torch.equal(FORMATS["fp8"].quantize(torch.tensor([448.0, -3.0, 0.4]))[0].float(), torch.tensor([448.0, -3.0, 0.40625]))
    for empty in (torch.zeros(3, 4), torch.zeros(0, 4)):
        codes, scale = FORMATS["int8"].quantize(empty)
        assert not codes.any() and torch.isfinite(scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reuse", [True, False])
def test_with_exact_codes_every_level_is_autograd(level, reuse):
    source = torch.Generator().manual_seed(1)
    map_ = torch.nn.Linear(24, 10).double()
    x = torch.randn(3, 5, 24, generator=source, dtype=torch.float64, requires_grad=True)
    E = torch.randn(3, 5, 10, generator=source, dtype=torch.float64)
    y = Rotated.apply(x, map_.weight, map_.bias, product_of(map_), Mode(Exact(), level, reuse))
    expected = map_(x)
    torch.testing.assert_close(y, expected)
    wanted = (x, map_.weight, map_.bias)
    for mine, theirs in zip(torch.autograd.grad(y, wanted, E), torch.autograd.grad(expected, wanted, E)):
        torch.testing.assert_close(mine, theirs)


def test_errors_with_outliers_are_those_of_the_paper():
    """3 channels of X times 60, 2 tokens of E times 100: what each rotation is for. Means over three draws."""
    found = {level: np.zeros(3) for level in LEVELS}
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        X, W = torch.randn(256, 512, generator=source), torch.randn(256, 512, generator=source) / 512**0.5
        E = torch.randn(256, 256, generator=source)
        X[:, :3] *= 60
        E[:2] *= 100
        for level in LEVELS:
            x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
            y = Rotated.apply(x, w, None, None, Mode(FORMATS["int8"], level))
            y.backward(E)
            found[level] += np.array([error(y, X @ W.T), error(x.grad, E @ W), error(w.grad, E.T @ X)]) / 3
    assert found[0][0] == pytest.approx(0.10, abs=0.02) and found[1][0] == found[2][0] == pytest.approx(0.014, abs=0.002)
    assert found[0][1] == pytest.approx(0.078, abs=0.02) and found[2][1] == pytest.approx(0.013, abs=0.002)
    assert found[1][1] > 5 * found[2][1]  # only tokens are rotated against this
    assert found[1][2] == found[2][2] < 0.75 * found[0][2]


@pytest.mark.parametrize("wants", ["all", "x", "w"])
def test_what_is_saved_for_the_backward_pass_is_codes(wants):
    B, n, m, saved = 12, 64, 32, []
    x = torch.randn(B, n, requires_grad=wants != "w")
    w = torch.randn(m, n, requires_grad=wants != "x")
    product = product_of(torch.nn.Linear(n, m))

    def count(level, format_, reuse):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = Rotated.apply(x, w, None, product, Mode(FORMATS[format_], level, reuse))
        assert y.requires_grad
        return sum(t.nbytes for t in saved)

    of_x, of_w = (B * n + 4) * (wants != "x"), (m * n + 4) * (wants != "w")
    for format_ in FORMATS:
        for level in LEVELS:
            assert count(level, format_, True) == of_x + of_w
            assert {t.dtype for t in saved if t.dim()} == {FORMATS[format_].dtype}
            assert count(level, format_, False) == of_x


# -- a model -----------------------------------------------------------------------------------------------------------
def test_a_step_leaves_the_model_as_it_was_and_evaluation_plain():
    step = built(HALO())
    state_of(step.model)  # made on first use
    ids, before = tiny.tokens(), {n: dict(m.__dict__) for n, m in step.model.named_modules()}
    with torch.no_grad():
        expected = step.model(input_ids=ids).logits
    loss, grads = gradients(step)
    plain_loss, plain = gradients(built(None))
    assert not torch.equal(loss, plain_loss) and abs(float(loss - plain_loss)) < 0.05 and grads.keys() == plain.keys()
    assert {n: {k for k in m.__dict__} for n, m in step.model.named_modules()} == {n: set(d) for n, d in before.items()}
    with torch.no_grad():
        assert torch.equal(step.model(input_ids=ids).logits, expected)
    with pytest.raises(RuntimeError, match="out"), low_precision([step.model.lm_head], step.estimator.mode):
        raise RuntimeError("out")
    assert "forward" not in step.model.lm_head.__dict__
    assert all(error(grads[n], plain[n]) < 0.2 for n in grads)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"format": "fp8"}, {"level": 0}, {"level": 1}, {"target_modules": "mlp"},
                                     {"exclude_modules": ["down_proj"]}])
def test_every_option_changes_the_gradients(changed):
    _, one = gradients(built(HALO()))
    _, two = gradients(built(HALO(**changed)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])
    _, again = gradients(built(HALO(**changed, reuse_weights=False)))
    assert all(torch.equal(two[n], again[n]) for n in two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_architectures_with_exact_codes_have_the_gradients_of_backpropagation(kind, monkeypatch):
    """Conv1D with biases, and experts, which stay as they are."""
    monkeypatch.setitem(FORMATS, "int8", Exact())
    for level in LEVELS:
        loss, mine = gradients(built(HALO(level=level), getattr(tiny, kind)().requires_grad_(True)))
        expected, theirs = gradients(built(None, getattr(tiny, kind)().requires_grad_(True)))
        torch.testing.assert_close(loss, expected)
        for n in theirs:
            torch.testing.assert_close(mine[n], theirs[n], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_under_an_adapter_the_base_is_quantized_and_the_adapter_is_not(storage, adapter, monkeypatch):
    def made(config):
        model = tiny.llama()
        if storage == "nf4":
            apply_storage(model, make_config("storage", storage))
        graft = graftwork.attach(model, adapter, r=4, seed=3)
        with torch.no_grad():
            for name, p in graft.named_parameters():
                if name.endswith("lora_B"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
        return built(config, model, graft)

    step, plain = made(HALO()), made(None)
    site = next(iter(step.grafts[0].sites))
    slot, module = step.model.get_submodule(site).graft.slot("whole"), step.model.get_submodule(site)
    frozen, x = slot.frozen, torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact, W = module(x), frozen.dense()
        with low_precision([module], step.estimator.mode):
            got = module(x)
        if adapter == "lora":  # base in low precision, the change as it is
            base = Rotated.apply(x, W, None, None, step.estimator.mode)
            torch.testing.assert_close(got, base + (exact - x @ W.T), rtol=1e-4, atol=1e-5)
    assert slot.frozen is frozen and 0 < error(got, exact) < 0.05
    loss, mine = gradients(step)
    expected, theirs = gradients(plain)
    assert mine.keys() == theirs.keys() and not torch.equal(loss, expected)
    assert np.median([error(mine[n], theirs[n]) for n in theirs]) < 0.1
    assert slot.frozen is frozen
    monkeypatch.setitem(FORMATS, "int8", Exact())
    loss, mine = gradients(made(HALO()))
    for n in theirs:
        torch.testing.assert_close(mine[n], theirs[n], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_checkpointing_and_accumulation(level):
    grads = []
    for checkpointing in (False, True):
        model = tiny.llama().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state_of(model).checkpoint_kwargs())
        grads.append(gradients(built(HALO(level=level), model), [batch_of(), batch_of(4)])[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.slow
def test_on_a_small_model_with_outliers_the_rotations_win_back_what_int8_loses():
    start = tiny.llama(seed=2)
    with torch.no_grad():  # an outlier channel that leaves the function as it is
        for layer in start.model.layers:
            for norm, maps in ((layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                               (layer.post_attention_layernorm, ("gate_proj", "up_proj"))):
                norm.weight[:1] *= 30
                for name, module in layer.named_modules():
                    if name.rpartition(".")[2] in maps:
                        module.weight[:, :1] /= 30

    def final(config):
        step = built(config, copy.deepcopy(start).requires_grad_(True), lr=5e-4)
        losses = [float(step.run([batch_of(at % 3, (24, 19))], at).loss) for at in range(20)]
        return float(np.mean(losses[-6:]))

    plain, levels = final(None), [final(HALO(level=level)) for level in LEVELS]
    assert levels[0] > plain + 0.1
    assert abs(levels[2] - plain) < 0.25 * (levels[0] - plain)
    assert abs(final(HALO(format="fp8", level=0)) - plain) < 0.25 * (levels[0] - plain)  # a format with exponents needs no rotation


@pytest.mark.slow
def test_a_recipe_plans_and_runs_and_adapters_save_the_codes_of_x_only(tmp_path):
    model, file = folder(tmp_path), completions(tmp_path / "d.jsonl")
    full = {"adapter": None, "optimizer": {"method": "adamw", "lr": 1e-3}, "train": {"gradient_checkpointing": True}}
    for sections in (full, {}):
        halo = recipe(model, file, tmp_path / f"a{len(sections)}", estimator={"method": "halo"}, **sections)
        made = graftwork.plan(halo, estimate_time=False)
        assert made.peak_bytes > 0 and not made.notes and made.flops > 0
        assert not sections or np.isfinite(run(halo).loss)
    peaks = [graftwork.plan(recipe(model, file, tmp_path / "p", estimator=e, adapter=None), estimate_time=False).peak_bytes
             for e in ({"method": "halo"}, {"method": "halo", "reuse_weights": False})]
    assert peaks[1] < peaks[0]


def test_refusals(tmp_path):
    model = tiny.llama(intermediate_size=98).requires_grad_(True)
    with pytest.raises(UsageError, match="98 inputs of 'model.layers.0.mlp.down_proj'") as caught:
        built(HALO(), model).compute([batch_of()], 0)
    assert "down_proj" in caught.value.remedy
    for fine in (HALO(level=0), HALO(exclude_modules=["down_proj"])):
        built(fine, model).compute([batch_of()], 0)
    with pytest.raises(UsageError, match="head belongs to the loss"):
        built(HALO(target_modules=["lm_head"])).compute([batch_of()], 0)
    with pytest.raises(IncompatibleError, match="one scale for all rows"):
        built(HALO()).compute([{**batch_of(), "rows": ["a", "b"]}], 0)
    (tmp_path / "f").mkdir()
    for name in "ab":
        completions(tmp_path / "f" / f"{name}.jsonl")
    with pytest.raises(Exception, match="halo treats the rows of a batch together"):
        load_recipe(recipe(tmp_path, tmp_path / "f" / "*.jsonl", tmp_path / "o", estimator={"method": "halo"}))
