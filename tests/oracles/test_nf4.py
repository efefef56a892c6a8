"""NF4 against bitsandbytes' functions and against the closed forms of the format."""

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import ModelError, UsageError
from graftwork.storage import nf4
from graftwork.storage.nf4 import NF4, NF4Storage

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its route for odd rows: seconds of a C++ compiler for nothing here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


SHAPES = [(1, 64), (8, 64), (64, 576), (7, 33), (5, 13), (3, 1), (130, 100), (33, 256 * 3), (300, 200), (1, 4)]


def matrix(shape, dtype=torch.float32, seed=0, spread=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if spread:  # block maxima over several decades
        weight = weight * torch.logspace(-3, 1, shape[0])[:, None]
    return weight.to(dtype)


def stored(weight, **options):
    return NF4Storage.from_weight(weight, NF4(compute="pytorch", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_every_byte_equals_bitsandbytes(shape, dtype, double_quant, spread):
    weight = matrix(shape, dtype, seed=sum(shape), spread=spread)
    ours = stored(weight, double_quant=double_quant)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(ours.codes, codes.view(-1))
    leaves = ours.leaves()
    if double_quant:
        assert torch.equal(leaves["absmax_codes"], state.absmax)
        assert torch.equal(leaves["absmax_scale"], state.state2.absmax)
        assert torch.equal(leaves["absmax_offset"][0], state.offset)
        assert torch.equal(ours.scales(), functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)
    else:
        assert torch.equal(leaves["absmax"], state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("block", [32, 128, 256, 1024, 4096])
def test_other_block_sizes(block):
    weight = matrix((48, 200), torch.bfloat16)
    ours = stored(weight, block_size=block)
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.leaves()["absmax_codes"], state.absmax)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))


def test_odd_values_equal_bitsandbytes():
    """Zeros, blocks of zeros, subnormals, equal blocks, values on the midpoints of the code book."""
    book = torch.tensor(nf4.NF4_VALUES)
    middles = torch.cat([(book[:-1] + book[1:]) / 2, torch.ones(49)])
    ramp = torch.linspace(-3, 3, 64)
    mixed = torch.stack([torch.zeros(64), torch.full((64,), 1e-39), middles, -middles, ramp, torch.ones(64)])
    for weight in (mixed, torch.ones(8, 64), torch.zeros(8, 64), matrix((8, 64)) * 1e30, matrix((8, 64)) * 1e-30):
        ours = stored(weight)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(ours.codes, codes.view(-1))
        assert torch.equal(ours.leaves()["absmax_codes"], state.absmax)
        assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))


def test_code_books_equal_their_generators():
    assert torch.equal(torch.tensor(nf4.NF4_VALUES), nf4.normal_float(4))
    assert torch.equal(nf4.normal_float(4), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), functional.create_dynamic_map())
    known = torch.tensor([-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1])
    torch.testing.assert_close(nf4.normal_float(3), known, atol=1e-6, rtol=0)
    torch.testing.assert_close(nf4.normal_float(2), torch.tensor([-1, 0, 0.337915, 1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("block, error", [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0987)])
def test_error_on_gaussian_weights(block, error):
    weight = matrix((256, 4096))
    found = (stored(weight, block_size=block, double_quant=False).dequantize() - weight).norm() / weight.norm()
    assert abs(found - error) < 1e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]),
       st.integers(0, 99))
def test_quantizing_again_is_the_identity(out_features, in_features, double_quant, dtype, seed):
    first = stored(matrix((out_features, in_features), dtype, seed), double_quant=double_quant)
    assert (first.scales() > 0).all()
    assert torch.equal(stored(first.dequantize(), double_quant=double_quant).codes, first.codes)


def test_bits_of_a_real_matrix():
    ours = stored(matrix((1536, 576)))
    assert ours.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 / (1536 * 576)
    assert stored(matrix((1536, 576)), double_quant=False).bits_per_weight == 4.5


def test_packing_puts_the_even_index_in_the_high_nibble():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 3], weight[0, 5] = 1.0, -1.0, 0.5626
    assert stored(weight, double_quant=False).codes[:3].tolist() == [0xF7, 0x70, 0x7D]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bitsandbytes_path_is_taken_and_changes_no_bit(dtype, monkeypatch):
    calls, plain = [], nf4._operation
    monkeypatch.setattr(nf4, "_operation", lambda name: calls.append(name) or plain(name))
    both = ["dequantize_blockwise", "dequantize_4bit"]  # the scales, and by them the weights
    weight, x = matrix((96, 128), dtype), matrix((5, 128), dtype, 1)
    ours = stored(weight)
    fast = NF4Storage.from_weight(weight, NF4(compute="bitsandbytes"))
    assert torch.equal(ours.dequantize(), fast.dequantize()) and calls == both
    assert torch.equal(ours(x), fast(x)) and calls == 2 * both
    assert torch.equal(ours.rows(torch.tensor([3, 90, 3])), fast.rows(torch.tensor([3, 90, 3]))) and calls == 3 * both
    ragged = NF4Storage.from_weight(matrix((96, 72), dtype), NF4(compute="bitsandbytes"))
    assert torch.equal(ragged.dequantize(), stored(matrix((96, 72), dtype)).dequantize())
    assert calls == 3 * both + both[:1]  # blocks that run over the end of a row are not for its vector code


def test_auto_chooses_by_installation_and_processor(monkeypatch):
    calls, loops, decode = [], [], nf4._compiled.decode_table
    monkeypatch.setattr(nf4, "_bitsandbytes", lambda codes, absmax, shape, *_: calls.append(1) or torch.zeros(shape))
    monkeypatch.setattr(nf4._compiled, "decode_table", lambda *a, **k: loops.append(1) or decode(*a, **k))
    auto = NF4Storage.from_weight(matrix((4, 64)), NF4())
    half = NF4Storage.from_weight(matrix((4, 64), torch.bfloat16), NF4())
    for installed, vector, compiled, threads in product((True, False), repeat=4):
        monkeypatch.setattr(nf4, "_importable", lambda value=installed: value)
        monkeypatch.setattr(nf4, "_vector_code", lambda value=vector: value)
        monkeypatch.setattr(nf4._compiled, "available", lambda value=compiled: value)
        monkeypatch.setattr(nf4._compiled._team, "has_all", lambda value=threads: value)
        for storage in (auto, half):
            ours = compiled and threads
            calls.clear(), loops.clear()
            storage.dequantize()
            assert (len(calls), len(loops)) == (not ours and installed and (vector or storage is auto), ours)
    calls.clear(), loops.clear()
    stored(matrix((4, 64))).dequantize()
    assert not calls + loops
    for missing in ("bitsandbytes", "numba"):
        with pytest.raises(UsageError, match=f"{missing}, which is not installed"):
            NF4Storage.from_weight(matrix((4, 64)), NF4(compute=missing))


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_ways_through_bitsandbytes(vector, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "_vector_code", lambda: vector)
    monkeypatch.setattr(nf4, "CHUNK", 256)  # two rows at a time, the last alone
    weight = matrix((33, 128), dtype)
    fast, plain = NF4Storage.from_weight(weight, NF4(compute="bitsandbytes")), stored(weight)
    for wanted in (torch.float32, torch.bfloat16, dtype):
        assert torch.equal(fast.dense_as(wanted), plain.dequantize().to(wanted))


def published(weight, double_quant=True, dtype=torch.uint8):
    """The tensors a checkpoint holds for one module."""
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant,
                                            quant_storage=dtype)
    tensors = {"weight": codes, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    return tensors, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("packed_as", [torch.uint8, torch.bfloat16], ids=str)
def test_published_checkpoints_keep_their_codes(double_quant, packed_as, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors, dense = published(matrix((48, 200), torch.bfloat16), double_quant, packed_as)
    tensors["bias"] = torch.randn(48, generator=torch.Generator().manual_seed(3)).bfloat16()
    save_file(tensors, tmp_path / "m.safetensors")
    ours = NF4Storage.from_checkpoint(load_file(tmp_path / "m.safetensors"))
    assert ours.compute_dtype == torch.bfloat16 and torch.equal(ours.dequantize(), dense)
    assert torch.equal(ours.codes, tensors["weight"].view(torch.uint8).view(-1)) and torch.equal(ours.bias, tensors["bias"])
    assert ours.options.double_quant is double_quant
    wide = NF4Storage.from_checkpoint(tensors, {"bnb_4bit_compute_dtype": "float32"})
    assert wide.dequantize().dtype == torch.float32 and torch.equal(wide.dequantize().bfloat16(), dense)


def test_damaged_checkpoints_are_refused():
    tensors, _ = published(matrix((48, 64)))
    record = "weight.quant_state.bitsandbytes__nf4"

    def changed(**changes):
        state = {**json.loads(bytes(tensors[record].tolist())), **changes}
        return {**tensors, record: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    fp4 = {k.replace("__nf4", "__fp4"): v for k, v in tensors.items()}
    cases = {"not an NF4 tensor": [fp4, {"weight": tensors["weight"]}],
             "missing": [{k: v for k, v in tensors.items() if k != "weight.absmax"}],
             "do not fit": [{**tensors, "weight": tensors["weight"][:-1]}, changed(shape=[48, 128])],
             "unreadable": [{**tensors, record: tensors[record][:-3]}],
             "unknown kind": [changed(blocksize=63), changed(quant_type="fp4")],
             "blocks of 128": [changed(nested_blocksize=128)],
             "not the code book": [{**tensors, "weight.quant_map": tensors["weight.quant_map"] * 0.9}]}
    for message, damaged in cases.items():
        for each in damaged:
            with pytest.raises(ModelError, match=message):
                NF4Storage.from_checkpoint(each)


@pytest.mark.parametrize("double_quant", [True, False])
def test_gradients_of_scales_given_as_leaves(double_quant):
    ours = stored(matrix((4, 96)), double_quant=double_quant)
    kept = ours.leaves()
    leaves = {n: t.clone().requires_grad_() for n, t in kept.items() if n in ours.trainable_leaves}
    dense = ours.dequantize(leaves)
    assert torch.equal(dense, ours.dequantize())
    upstream = matrix((4, 96), seed=5)
    dense.backward(upstream)
    book = torch.tensor(nf4.NF4_VALUES)[torch.stack([kept["codes"] >> 4, kept["codes"] & 15], 1).view(-1).long()].double()
    per_block = torch.stack([part.sum() for part in (upstream.double().view(-1) * book).split(64)])
    if double_quant:
        mapped = nf4.dynamic_map()[kept["absmax_codes"].long()].double()
        torch.testing.assert_close(leaves["absmax_offset"].grad.double(), per_block.sum().view(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaves["absmax_scale"].grad.double(), (per_block * mapped).sum().view(1), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(leaves["absmax"].grad.double(), per_block, rtol=1e-5, atol=1e-5)
    whole = ours.dequantize({"absmax": ours.scales() * 2})
    torch.testing.assert_close(whole, ours.dequantize() * 2)
    with pytest.raises(UsageError, match="no leaf 'zeros'"):
        ours.dequantize({"zeros": torch.zeros(1)})


def test_fake_quantize_rounds_forward_and_passes_the_gradient():
    weight = matrix((6, 96)).requires_grad_()
    ours = stored(weight.detach())
    rounded = ours.fake_quantize(weight)
    assert torch.equal(rounded, ours.dequantize())
    rounded.backward(upstream := matrix((6, 96), seed=8))
    assert torch.equal(weight.grad, upstream)
    weight.grad = None
    absmax = (ours.scales() * 0.5).requires_grad_()  # half the range: what is outside is clipped and gets no gradient
    clipped = ours.fake_quantize(weight, {"absmax": absmax})
    scale = absmax.detach().repeat_interleave(64).view(6, 96)
    assert (clipped.detach().abs() <= scale).all()
    nearest = (torch.tensor(nf4.NF4_VALUES) * scale[..., None])
    best = (nearest - weight.detach()[..., None]).abs().amin(-1)
    torch.testing.assert_close((clipped - weight).detach().abs(), best)
    clipped.backward(upstream)
    assert torch.equal(weight.grad, upstream * ((weight.detach() / scale).abs() <= 1)) and absmax.grad.abs().min() > 0


def test_chunks_do_not_show(monkeypatch):
    weight = matrix((37, 131), torch.bfloat16)
    whole = stored(weight)
    before = whole.dequantize()
    monkeypatch.setattr(nf4, "CHUNK", 256)
    assert torch.equal(whole.dequantize(), before)
    assert torch.equal(whole.dense_as(torch.float32), before.float())
    assert torch.equal(whole.float().dequantize().bfloat16(), before)


def test_wrong_block_size_names_the_choices():
    from graftwork.registry import make_config

    with pytest.raises(UsageError, match="must be one of 32, 64"):
        make_config("storage", "nf4", block_size=48)
