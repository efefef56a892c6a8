"""Every storage format, taken from the registry: what a format promises whatever its numbers are."""

import copy
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import graftwork.storage
import tiny
from graftwork.errors import UsageError
from graftwork.registry import lookup, make_config, methods
from graftwork.storage import Storage, apply_storage, storage_bits
from graftwork.storage.base import make_storage

#: relative error that a format of few bits may have on normal numbers, where it is not 0.25
COARSE = {"int3": 0.3, "int2": 0.7, "vptq": 0.7, "mixed": 0.7}
#: starts of the names of leaves whose size depends on the values of the weight; plans expect a size
VARYING = {"spqr": ("outlier_values", "outlier_columns"),  # mixllm's only where a whole model was ranked
           "mixed": ("codes", "scale", "zero")}  # of a whole model only
#: inputs for formats whose codes depend on data
SOME = [{"input_ids": tiny.tokens(4, 16)}]
pytestmark = pytest.mark.filterwarnings("ignore:storage .* had no calibration data")
FORMATS = [info.name for info in methods("storage")]
DTYPES = [torch.float32, torch.bfloat16]
#: formats of `make test-fast`, and those that meet every model in every run; models that every format meets there
COMMON, MODELS = ("dense", "nf4", "int8", "int4", "lowrank_plus"), ("bert", "gpt2", "llama", "mixtral")
every = pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in COMMON else [pytest.mark.slow]) for m in FORMATS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrix(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keep(method, weight, **kwargs):
    return make_storage(weight, method, lookup("storage", method).config(), **kwargs)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)


def sizes(method, tensors):
    return {n: (None if n.split(".")[-1].startswith(VARYING.get(method, ())) else t.shape, t.dtype) for n, t in tensors}


def lossless(method):
    return lookup("storage", method).traits.get("lossless", False)


def test_every_format_is_collected():
    defined = set()
    for module in pkgutil.iter_modules(graftwork.storage.__path__):
        loaded = importlib.import_module(f"graftwork.storage.{module.name}")
        defined |= {v for v in vars(loaded).values() if isinstance(v, type) and issubclass(v, Storage)}
    # bases are no formats; classes that others derive from these as they run (other tests may have) make none of them a base
    formats = {v for v in defined if defined.isdisjoint(v.__subclasses__())}
    assert {lookup("storage", name).cls for name in FORMATS} == formats
    assert set(FORMATS) >= {"dense", "nf4"}


@every
@settings(max_examples=12, deadline=None)
@given(out_features=st.integers(1, 70), in_features=st.integers(1, 140), seed=st.integers(0, 50), dtype=st.sampled_from(DTYPES))
def test_any_shape(method, out_features, in_features, seed, dtype):
    weight = matrix(out_features, in_features, dtype=dtype, seed=seed)
    stored = keep(method, weight)
    dense = stored.dequantize()
    assert dense.shape == weight.shape and dense.dtype == dtype and (stored.out_features, stored.in_features) == weight.shape
    assert torch.equal(stored.rows(torch.tensor([out_features - 1, 0])), dense[[out_features - 1, 0]])
    assert stored(matrix(2, 3, in_features, dtype=dtype)).shape == (2, 3, out_features)
    error = (dense.float() - weight.float()).norm() / weight.float().norm()
    assert error == 0 if lossless(method) else error < COARSE.get(method, 0.25)
    assert torch.equal(keep(method, dense).dequantize(), dense) or error > 0


@every
@each_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_forward_is_the_product_with_the_dequantized_weight(method, dtype, bias, rows):
    offset = matrix(48, dtype=dtype, seed=3) if bias else None
    stored = keep(method, matrix(48, 96, dtype=dtype), bias=offset)
    x = matrix(rows, 96, dtype=dtype, seed=1)
    expected = F.linear(x.double(), stored.dequantize().double(), None if offset is None else offset.double())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert stored(x).dtype == dtype
    assert (stored(x).double() - expected).norm() / expected.norm() < tolerance
    without = stored.product(x).double() + (0 if offset is None else offset.double())
    assert (without - expected).norm() / expected.norm() < tolerance
    assert (stored(x, stored.leaves()).double() - expected).norm() / expected.norm() < tolerance


@every
@each_dtype
def test_gradient_is_the_dense_one(method, dtype):
    stored = keep(method, matrix(48, 96, dtype=dtype))
    x = matrix(2, 20, 96, dtype=dtype, seed=1).requires_grad_()
    upstream = matrix(2, 20, 48, dtype=dtype, seed=2)
    stored(x).backward(upstream)
    expected = upstream.double() @ stored.dequantize().double()
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert x.grad.dtype == dtype and (x.grad.double() - expected).norm() / expected.norm() < tolerance
    assert all(p.grad is None and not p.requires_grad for p in stored.parameters())


@every
def test_second_and_forward_mode_derivatives(method):
    stored = keep(method, matrix(8, 16))
    x = matrix(3, 16, seed=1)
    assert torch.autograd.gradgradcheck(lambda v: stored.double()(v).pow(2), x.double().requires_grad_(), atol=1e-4)
    _, tangent = torch.func.jvp(lambda v: F.linear(v, stored.dequantize()), (x.double(),), (x.double(),))
    with torch.autograd.forward_ad.dual_level():
        dual = stored(torch.autograd.forward_ad.make_dual(x.double(), x.double()))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@every
def test_nothing_dense_is_saved_for_backward(method):
    stored = keep(method, matrix(48, 96))
    own = {p.untyped_storage().data_ptr() for p in stored.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stored(matrix(5, 96, seed=1).requires_grad_())
    assert sum(t.numel() for t in saved if t.untyped_storage().data_ptr() not in own) == 0


@every
def test_leaves_are_frozen_bytes_and_casts_leave_them(method):
    stored = keep(method, matrix(48, 96), bias=matrix(48))
    assert not any(p.requires_grad for p in stored.parameters()) and not list(stored.buffers())
    assert stored.weight.numel() == 0 and stored.weight.dtype == torch.float32
    if lossless(method):
        return
    codes = {n: p for n, p in stored.named_parameters() if n != "bias"}
    assert all(p.dtype == torch.uint8 for p in codes.values())
    before, dense = {n: p.clone() for n, p in codes.items()}, stored.dequantize()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        stored.to(dtype)
        assert all(torch.equal(p, before[n]) and p.dtype == torch.uint8 for n, p in stored.named_parameters() if n != "bias")
        assert stored.dequantize().dtype == stored.weight.dtype == stored.bias.dtype == dtype
        assert torch.equal(stored.dequantize(), dense.to(dtype))


@every
@each_dtype
def test_state_dict_through_a_file_is_bit_exact(method, dtype, tmp_path):
    stored = keep(method, matrix(33, 70, dtype=dtype), bias=matrix(33, dtype=dtype))
    save_file(stored.state_dict(), tmp_path / "s.safetensors")
    for assign in (False, True):
        blank = torch.zeros(33, 70, dtype=dtype, device="meta" if assign else "cpu")
        other = keep(method, blank, bias=matrix(33, dtype=dtype))
        other.load_state_dict(load_file(tmp_path / "s.safetensors"), assign=assign)
        assert same(state(other), state(stored))
        assert torch.equal(other.dequantize(), stored.dequantize()) and other.bits_per_weight == stored.bits_per_weight


@every
def test_a_leaf_may_start_anywhere_in_a_buffer(method):
    stored = keep(method, matrix(33, 70))
    dense = stored.dequantize().clone()
    if lossless(method):
        return
    for name, parameter in list(stored.named_parameters()):
        buffer = torch.cat([torch.zeros(3, dtype=torch.uint8), parameter.detach()])
        setattr(stored, name, torch.nn.Parameter(buffer[3:], requires_grad=False))
    assert torch.equal(stored.dequantize(), dense)


@every
@each_dtype
@pytest.mark.parametrize("shape", [(48, 96), (33, 71), (1, 1), (70, 640)], ids=str)
def test_bits_per_weight_counts_every_byte(method, dtype, shape):
    stored = keep(method, matrix(*shape, dtype=dtype), bias=matrix(shape[0], dtype=dtype))
    size = shape[0] * shape[1]
    counted = 8 * sum(len(p.view(torch.uint8).flatten()) for n, p in stored.named_parameters() if n != "bias") / size
    leaves = 8 * sum(t.numel() * t.element_size() for t in stored.leaves().values()) / size
    blocks = -(-size // 64)
    formula = {"dense": 8 * dtype.itemsize, "nf4": 8 * (-(-size // 2) + blocks + 4 * -(-blocks // 256) + 4) / size}
    assert stored.bits_per_weight == counted == leaves == formula.get(method, counted)


@every
@each_dtype
def test_a_forward_changes_nothing(method, dtype):
    stored = keep(method, matrix(64, 128, dtype=dtype)).eval()
    before, dense = state(stored), stored.dequantize().clone()
    x = matrix(4, 128, dtype=dtype, seed=1)
    with torch.no_grad():
        first = stored(x)
    with torch.inference_mode():
        stored(x)
    stored.train()(x.clone().requires_grad_()).sum().backward()
    assert torch.equal(stored(x), first) and same(state(stored), before) and torch.equal(stored.dequantize(), dense)


@every
def test_quantizing_is_deterministic_and_leaves_the_global_generator_alone(method):
    before = torch.get_rng_state()
    assert same(state(keep(method, matrix(40, 70))), state(keep(method, matrix(40, 70))))
    assert torch.equal(torch.get_rng_state(), before)
    transposed = matrix(70, 40).T
    assert same(state(keep(method, transposed)), state(keep(method, transposed.contiguous())))


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(method, value):
    weight = matrix(4, 70)
    weight[2, 67] = value
    with pytest.raises(UsageError, match="NaN or infinite"):
        keep(method, weight)


@every
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4)], ids=str)
def test_what_is_no_matrix_is_refused(method, shape):
    with pytest.raises(UsageError, match="shape"):
        keep(method, torch.zeros(shape))


@every
@each_dtype
def test_fake_tensors_have_the_real_bytes(method, dtype):
    real = keep(method, matrix(37, 71, dtype=dtype))
    expected = [sizes(method, tensors) for tensors in (real.named_parameters(), real.leaves().items())]
    bits = real.bits_per_weight
    with FakeTensorMode():
        fake = keep(method, torch.empty(37, 71, dtype=dtype))
        x = torch.empty(2, 5, 71, dtype=dtype, requires_grad=True)
        y = fake(x)
        y.sum().backward()
        assert y.shape == (2, 5, 37) and y.dtype == dtype and x.grad.shape == x.shape and x.grad.dtype == dtype
        assert fake.dequantize().shape == (37, 71) and fake.dequantize().dtype == dtype
        assert fake.rows(torch.zeros(3, dtype=torch.int64)).shape == (3, 71)
        found = [sizes(method, tensors) for tensors in (fake.named_parameters(), fake.leaves().items())]
        assert found == expected and fake.bits_per_weight == pytest.approx(bits, abs=2 if method in VARYING else 0)
    assert torch.equal(keep(method, matrix(37, 71, dtype=dtype)).dequantize(), real.dequantize())  # nothing fake was remembered


@every
@each_dtype
def test_a_step_on_fake_tensors_peaks_where_the_real_one_does(method, dtype):
    from graftwork.planning.ledger import Ledger

    def peak():
        stored = keep(method, torch.zeros(700, 640, dtype=dtype).add_(1))
        with Ledger() as ledger:
            ledger.track(stored, "weights")
            stored(torch.zeros(6, 640, dtype=dtype).add_(1).requires_grad_()).sum().backward()
            return ledger.peak_bytes

    real = peak()
    with FakeTensorMode():
        fake = peak()
    assert real > 700 * 640 * dtype.itemsize and abs(fake - real) <= 0.02 * real


@every
def test_only_a_format_that_can_reads_published_checkpoints(method):
    with pytest.raises(Exception, match="published|not an NF4"):
        lookup("storage", method).cls.from_checkpoint({"weight": torch.zeros(2, 2)})


@every
def test_straight_through_quantizer(method):
    weight = matrix(12, 70).requires_grad_()
    stored = keep(method, weight.detach())
    value = stored.fake_quantize(weight)
    value.backward(upstream := matrix(12, 70, seed=4))
    torch.testing.assert_close(value, stored.dequantize())
    assert torch.equal(weight.grad, upstream)


@pytest.mark.slow
def test_formats_are_imported_and_sized_where_tensors_have_no_values():
    script = ("import torch\nfrom torch._subclasses.fake_tensor import FakeTensorMode\nfrom graftwork.registry import methods\n"
              "with FakeTensorMode(), torch.device('meta'):\n    found = methods('storage'), methods('calibration')\n"
              "with torch.device('meta'):  # as `graft methods` does\n"
              "    [m.cls.from_weight(torch.empty(64, 64), m.config()) for m in found[0]]")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [
    ("int4", {"calibration": "gptq"}), ("nf", {"calibration": "awq"}), ("mixllm", {"calibration": "gptq"}), ("spqr", {}),
    ("codebook", {"weighted": True}), ("codebook", {"fit": "jlcm"}), ("lowrank_plus", {"weighting": "hessian"}),
    ("lowrank_plus", {"init": "svdquant"}), ("lowrank_plus", {"base": {"method": "int4", "calibration": "gptq"}})])
@pytest.mark.filterwarnings("ignore:.*no calibration data")
def test_formats_that_read_data_quantize_weights_that_no_data_belongs_to(method, options):
    cls, config = lookup("storage", method).cls, make_config("storage", method, **options)
    plain, weight = cls.without_data(config), matrix(12, 70).requires_grad_()
    assert cls.needs(config) and plain == cls.without_data(plain) and (not cls.needs(plain) or cls.does_without)
    stored = cls.from_weight(weight.detach(), plain)
    stored.options = config  # as after a calibration
    value = stored.fake_quantize(weight)
    value.backward(upstream := matrix(12, 70, seed=4))
    torch.testing.assert_close(value, stored.dequantize())
    assert torch.equal(weight.grad, upstream)


def _marks(method, name):
    if name == "llama" and method in COMMON:
        return []
    return [pytest.mark.slow if method in COMMON or name in MODELS else pytest.mark.full]


@pytest.mark.parametrize("method, name", [pytest.param(method, name, marks=_marks(method, name))
                                          for method in FORMATS for name in sorted(tiny.ALL)])
def test_whole_models(method, name):
    model = tiny.ALL[name]()
    plain = copy.deepcopy(model)
    seen = []
    apply_storage(model, lookup("storage", method).config(), on_site=seen.append, batches=SOME)
    ids = tiny.tokens()
    with torch.no_grad():
        got, reference = model(input_ids=ids)[0], plain(input_ids=ids)[0]
    error = (got - reference).norm() / reference.norm()
    if method == "dense":
        assert error == 0 and not seen
        return
    stored = {n: m for n, m in model.named_modules() if isinstance(m, Storage)}
    assert error == 0 if lossless(method) else 0 < error < (0.8 if COARSE.get(method, 0) < 0.5 else 2)
    assert seen and len(stored) == len(seen)
    assert storage_bits(model) == pytest.approx(sum(m.bits_per_weight * m.in_features * m.out_features for m in stored.values())
                                                / sum(m.in_features * m.out_features for m in stored.values()))
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    assert head is None or (type(head) is torch.nn.Linear and head.weight.requires_grad)
    for each, module in stored.items():  # the dense model with D(W) in place of W gives the same outputs
        put_dense(plain, each, module.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(got, plain(input_ids=ids)[0], atol=2e-5, rtol=1e-4)


def put_dense(plain, name, weight):
    from transformers.pytorch_utils import Conv1D

    *path, last = name.split(".")
    with torch.no_grad():
        if last.isdigit() and path[-1] in ("gate_up_proj", "down_proj"):
            plain.get_parameter(".".join(path))[int(last)].copy_(weight)
        else:
            module = plain.get_submodule(name)
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


@every
def test_skipped_modules_and_the_head_stay_dense(method):
    if method == "dense":
        return
    config = lookup("storage", method).config(skip_modules=["v_proj"])
    model = apply_storage(tiny.llama(tied=False), config, batches=SOME)
    attention = model.model.layers[0].self_attn
    assert type(attention.v_proj) is torch.nn.Linear and isinstance(attention.q_proj, Storage)
    assert type(model.lm_head) is torch.nn.Linear
    classifier = apply_storage(tiny.bert_classifier(), lookup("storage", method).config(), batches=SOME)
    assert type(classifier.classifier) is torch.nn.Linear
    model.to(torch.bfloat16)
    assert model(input_ids=tiny.tokens()).logits.dtype == torch.bfloat16


@every
def test_a_stored_model_under_fake_tensors(method):
    with FakeTensorMode():
        model = apply_storage(tiny.llama(), lookup("storage", method).config())
        logits = model(input_ids=torch.zeros(2, 8, dtype=torch.int64)).logits
        logits.sum().backward()
        assert logits.shape == (2, 8, tiny.VOCAB)
        fake, planned = sizes(method, model.named_parameters()), sum(p.nbytes for p in model.parameters())
        stored = [module for module in model.modules() if isinstance(module, Storage)]  # alike, and still each its own
        kept = [each for module in stored for each in module.parameters()]
        assert len({each.untyped_storage()._cdata for each in kept}) == len(kept)
        for module in stored[:1]:
            module.register_forward_hook(lambda *_: None)
        assert not any(module._forward_hooks for module in stored[1:])
    real = apply_storage(tiny.llama(), lookup("storage", method).config(), batches=SOME)
    if method == "mixllm":  # its wide rows lie where a ranking of the whole model puts them, as many as planned
        assert sum(p.nbytes for p in real.parameters()) == pytest.approx(planned, rel=0.01)
    else:
        assert fake == sizes(method, real.named_parameters())
