"""GGUF files read back: by the gguf package (names, shapes, alpha, rotary order) and by Transformers' own GGUF loader."""

import re

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftwork
import tiny
from graftwork.errors import GraftworkError, IncompatibleError, UsageError
from graftwork.interchange.gguf import write_gguf_adapter, write_gguf_merged
from graftwork.interchange.modelfile import chat_format, modelfile

HEADS = {"q": tiny.HEADS, "k": tiny.KV_HEADS}


def ours(model, method="lora", seed=1, **options):
    graft = graftwork.attach(model, method, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return graft


def read(file):
    reader = gguf.GGUFReader(file)
    return reader, {t.name: np.array(t.data) for t in reader.tensors}


def value(reader, key):
    return reader.fields[key].contents()


def un_permuted(rows, heads):
    """GGUF's row order back to Transformers': pairs (2i, 2i+1) of a head become (i, i + d/2). Written out by hand."""
    out = np.empty_like(rows)
    d = rows.shape[0] // heads
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + i] = rows[head * d + 2 * i]
            out[head * d + i + d // 2] = rows[head * d + 2 * i + 1]
    return out


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


PLACES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
          "up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.mark.parametrize("options", [dict(r=3, alpha=6), dict(r=4, alpha=6, use_rslora=True, rank_pattern={"q_proj": 2},
                                                              alpha_pattern={"k_proj": 1})], ids=["plain", "rslora, patterns"])
def test_adapter_file_holds_the_change_under_llama_cpps_rules(options, tmp_path):
    model = tiny.llama()
    graft = ours(model, **options)
    report = write_gguf_adapter(graft, tmp_path / "x", tokenizer=tiny.tokenizer())
    reader, tensors = read(tmp_path / "x" / "adapter.gguf")
    assert value(reader, "general.type") == "adapter" and value(reader, "general.architecture") == "llama"
    assert value(reader, "adapter.type") == "lora" and report["error"] == 0.0
    alpha = value(reader, "adapter.lora.alpha")
    changes = graft.delta_weights()
    assert len(tensors) == 2 * len(changes)
    for name, change in changes.items():
        layer, last = name.split(".")[2], name.split(".")[-1]
        A, B = (tensors[f"blk.{layer}.{PLACES[last]}.weight.lora_{ab}"] for ab in "ab")
        assert A.shape == (options["r"], change.shape[1]) and B.shape == (change.shape[0], options["r"])
        applied = alpha / B.shape[1] * B @ A  # what llama.cpp adds, at user scale 1
        if last[0] in HEADS and last in ("q_proj", "k_proj"):
            assert not np.allclose(applied, change.numpy(), atol=1e-3)
            applied = un_permuted(applied, HEADS[last[0]])
        np.testing.assert_allclose(applied, change.numpy(), atol=1e-5)


def test_adapter_of_architectures_without_permutation(tmp_path):
    model = tiny.gpt2()
    graft = ours(model, r=2, target_modules="q,v")
    write_gguf_adapter(graft, tmp_path / "g")
    _, tensors = read(tmp_path / "g" / "adapter.gguf")
    found = tensors["blk.1.attn_qkv.weight.lora_b"] @ tensors["blk.1.attn_qkv.weight.lora_a"]
    changes = graft.delta_weights()
    zero = torch.zeros_like(changes["transformer.h.1.attn.c_attn[q]"])
    wanted = torch.cat([changes["transformer.h.1.attn.c_attn[q]"], zero, changes["transformer.h.1.attn.c_attn[v]"]])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    model = tiny.qwen3()
    graft = ours(model, r=2, target_modules=["q_proj"])
    write_gguf_adapter(graft, tmp_path / "q")
    reader, tensors = read(tmp_path / "q" / "adapter.gguf")
    assert value(reader, "general.architecture") == "qwen3"
    found = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    np.testing.assert_allclose(found, graft.delta_weights()["model.layers.0.self_attn.q_proj"].numpy(), atol=1e-6)


@pytest.mark.parametrize("kind, options, words", [
    ("mixtral", dict(r=2), "expert"), ("gpt2", dict(r=2, bias="lora_only"), "biases"), ("bert", dict(r=2), "'bert'"),
    ("llama", dict(r=2, target_modules=["lm_head", "q_proj"]), "shares its weight"),
    ("qwen3", dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "whole modules")])
def test_what_llama_cpp_cannot_hold_is_refused(kind, options, words, tmp_path):
    graft = ours(tiny.ALL[kind](), **options)
    with pytest.raises(IncompatibleError, match=words) as caught:
        write_gguf_adapter(graft, tmp_path / "x")
    assert caught.value.remedy and not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind, method, options", [
    ("llama", "lora", dict(r=3, alpha=5)), ("llama", "flora", dict(r=1)), ("gpt2", "lora", dict(r=2, bias="lora_only")),
    ("qwen3", "paca", dict(r=3)), ("llama", "lora", dict(r=2, target_modules=["lm_head", "k_proj"]))])
def test_merged_file_through_transformers_loader(kind, method, options, tmp_path):
    model = tiny.CAUSAL[kind]()
    graft = ours(model, method, **options)
    wanted = logits(model)
    report = write_gguf_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer(), dtype="f32")
    # that loader reads no head size of Qwen3, and no width of the MLP and positions of GPT-2, which are unusual here
    sizes = {} if kind == "llama" else {"config": model.config}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", gguf_file="model.gguf", dtype=torch.float32, **sizes).eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-4)
    assert report.worst < 1e-5


def test_merged_metadata_and_tokenizer(tmp_path):
    graft = ours(tiny.llama(), r=2)
    own = tiny.tokenizer()
    write_gguf_merged(graft, tmp_path / "m", tokenizer=own)
    reader, tensors = read(tmp_path / "m" / "model.gguf")
    assert value(reader, "general.type") == "model" and value(reader, "general.file_type") == 1
    assert value(reader, "llama.attention.head_count_kv") == tiny.KV_HEADS and value(reader, "llama.block_count") == tiny.LAYERS
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2" and value(reader, "tokenizer.chat_template") == own.chat_template
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32" and "output.weight" not in kinds
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m", gguf_file="model.gguf")
    for text in ("the user is in the sea", "a  b\n\nc", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer(text).input_ids == own(text).input_ids
    assert tensors["blk.0.ffn_up.weight"].dtype == np.float16


@pytest.mark.parametrize("dtype, kind, number", [("bf16", "BF16", 32), ("f16", "F16", 1)])
def test_merged_values_are_rounded_once(dtype, kind, number, tmp_path):
    model = tiny.llama()
    graft = ours(model, r=2)
    report = write_gguf_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer(), dtype=dtype)
    reader, _ = read(tmp_path / "m" / "model.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_k.weight")
    assert tensor.tensor_type.name == kind and value(reader, "general.file_type") == number
    found = un_permuted(gguf.quants.dequantize(tensor.data, tensor.tensor_type), tiny.KV_HEADS)
    name = "model.layers.1.self_attn.k_proj"
    exact = model.get_submodule(name).weight.detach() + graft.delta_weights()[name]
    assert np.array_equal(found, exact.to(torch.bfloat16 if dtype == "bf16" else torch.float16).float().numpy())
    lost = np.linalg.norm(found - exact.numpy()) / graft.delta_weights()[name].norm().item()
    assert abs(report.errors[name] - lost) < 1e-6 and lost > 1e-5
    with pytest.raises(UsageError, match="q4"):
        write_gguf_merged(graft, tmp_path / "n", tokenizer=tiny.tokenizer(), dtype="q4")


def test_values_beyond_fp16_are_refused(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    graft = ours(model, r=2)
    with pytest.raises(GraftworkError, match="fp16 cannot hold"):
        write_gguf_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer())
    assert list(tmp_path.iterdir()) == []
    write_gguf_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer(), dtype="bf16")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, tensor, tensor_endianess=None):
        raise OSError("4096 requested and 0 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(GraftworkError, match="no space left"):
        write_gguf_merged(ours(tiny.llama(), r=2), tmp_path / "m", tokenizer=tiny.tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_came_as_gguf_keeps_its_metadata(tmp_path):
    first = ours(tiny.llama(), r=2)
    write_gguf_merged(first, tmp_path / "base", tokenizer=tiny.tokenizer(), dtype="f32")
    file = tmp_path / "base" / "model.gguf"
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "named.gguf", "llama")
    from graftwork.interchange.gguf_metadata import copy_fields
    copy_fields(writer, reader)
    writer.add_string("general.organization", "a house")
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 2, 8, dtype=np.float32))
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, tokenizer = graftwork.load(tmp_path / "named.gguf")
    graft = ours(model, r=2, seed=3, target_modules=["q_proj"])
    write_gguf_merged(graft, tmp_path / "m", tokenizer=tokenizer, dtype="f32")
    write_gguf_adapter(graft, tmp_path / "a", tokenizer=tokenizer)
    made, tensors = read(tmp_path / "m" / "model.gguf")
    assert value(made, "general.organization") == "a house" and value(made, "tokenizer.ggml.pre") == "gpt-2"
    assert value(made, "tokenizer.ggml.merges") == value(reader, "tokenizer.ggml.merges")
    np.testing.assert_array_equal(tensors["rope_freqs.weight"], np.linspace(1, 2, 8, dtype=np.float32))
    _, before = read(tmp_path / "named.gguf")
    changed = {k for k in before if not np.array_equal(before[k], tensors[k])}
    assert changed == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"} and set(before) == set(tensors)
    _, pair = read(tmp_path / "a" / "adapter.gguf")  # base file + adapter file = merged file, in GGUF's own order
    moved = before["blk.0.attn_q.weight"] + pair["blk.0.attn_q.weight.lora_b"] @ pair["blk.0.attn_q.weight.lora_a"]
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight"], moved, atol=1e-6)
    assert f"FROM {(tmp_path / 'named.gguf').resolve()}\nADAPTER ./adapter.gguf\n" in (tmp_path / "a" / "Modelfile").read_text()


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tmp_path):
    from tokenizers import pre_tokenizers

    graft = ours(tiny.llama(), r=2)
    for pre in (pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        tokenizer = tiny.tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre
        with pytest.raises(IncompatibleError, match="tokenizer") as caught:
            write_gguf_merged(graft, tmp_path / "m", tokenizer=tokenizer)
        assert "convert_hf_to_gguf" in caught.value.remedy and not (tmp_path / "m").exists()
    with pytest.raises(IncompatibleError, match="tokenizer.json"):
        write_gguf_merged(graft, tmp_path / "m")


# -- Modelfile --------------------------------------------------------------------------------------------------------------
def run_go(template, messages):
    """The few forms of Go's template language that a Modelfile of ours uses."""
    body = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S)
    parts = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body[1])
    branches = dict(zip(parts[1::2], parts[2::2]))
    text = "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + body[2]
    return text.replace('{{ "{{" }}', "{{")


DEFAULT = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" +
           tiny.CHATML)
BRACES = ("{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '|' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '{{a}}' }}{% endif %}")
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
         {"role": "user", "content": "{ .Content }"}]


@pytest.mark.parametrize("template, system", [(tiny.CHATML, None), (DEFAULT, "You are kind."), (BRACES, None)])
def test_go_template_renders_what_the_tokenizer_renders(template, system):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    pieces = chat_format(tokenizer)
    assert pieces.system == system
    assert run_go(pieces.go_template(), TURNS) == tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    if system:
        alone = [{"role": "system", "content": system}, TURNS[1]]
        assert run_go(pieces.go_template(), alone) == tokenizer.apply_chat_template(TURNS[1:2], tokenize=False,
                                                                                  add_generation_prompt=True)


def test_bos_of_the_template_is_left_to_llama_cpp():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.chat_template = "{{ bos_token }}" + tiny.CHATML
    assert "<unk>" not in chat_format(tokenizer).go_template()


def test_modelfile_text():
    model = tiny.llama()
    text = modelfile("./model.gguf", model, tiny.tokenizer())
    assert text == ('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
                    '{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
                    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
                    '<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')
    odd = tiny.tokenizer()
    odd.chat_template = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"
    assert "TEMPLATE" not in modelfile("x", model, odd) and "could not be written" in modelfile("x", model, odd)
    odd.chat_template = None
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("x", model, odd)


def test_through_llama_cpp(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny.llama()
    graft = ours(model, r=2, alpha=4)
    write_gguf_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer(), dtype="f32")
    engine = llama_cpp.Llama(str(tmp_path / "m" / "model.gguf"), logits_all=True, verbose=False)
    ids = tiny.tokens(rows=1)[0]
    engine.eval(ids.tolist())
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    found = torch.tensor(np.array(engine.scores[: len(ids)]))
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
