"""Merged folders, LoRA artifacts, mlx folders, and the verbs merge and convert."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graftwork
import tiny
from graftwork.errors import GraftworkError, IncompatibleError, UsageError
from graftwork.interchange.lora import write_lora
from graftwork.interchange.merged import write_merged
from graftwork.interchange.mlx import write_mlx
from graftwork.interchange.opening import open_saved
from graftwork.modeling.models import load_model


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def fill(graft, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return graft


def ours(model, method, **options):
    return fill(graftwork.attach(model, method, **options))


def reload(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


# -- merged -----------------------------------------------------------------------------------------------------------------
MERGED = {
    "llama": ("llama", "lora", dict(r=3, alpha=5)), "gpt2 bias": ("gpt2", "lora", dict(r=2, bias="lora_only")),
    "gpt2 slices": ("gpt2", "lora", dict(r=2, bias="lora_only", target_modules="k,v")), "paca": ("qwen3", "paca", dict(r=3)),
    "experts": ("mixtral", "lora", dict(r=2)), "flora": ("llama", "flora", dict(r=2)),
    "saved head": ("qwen3", "lora", dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tied head": ("llama", "lora", dict(r=2, target_modules=["q_proj", "lm_head"])),
}


@pytest.mark.parametrize("case", MERGED)
def test_merged_folder_reloads_to_equal_logits(case, tmp_path):
    kind, method, options = MERGED[case]
    model = tiny.CAUSAL[kind]()
    graft = ours(model, method, **options)
    wanted = logits(model)
    report = write_merged(graft, tmp_path / "m", tokenizer=tiny.tokenizer())
    assert torch.equal(logits(model), wanted)  # the live model is as it was
    again = reload(tmp_path / "m")
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
    assert set(report.errors) == set(graft.adapters) and report.worst < 1e-5
    assert again.config.tie_word_embeddings == (kind in ("llama", "gpt2") and case != "tied head")
    assert (tmp_path / "m" / "tokenizer.json").exists() and (tmp_path / "m" / "generation_config.json").exists()


def test_merged_files_are_those_of_save_pretrained(tmp_path):
    """Names, fusions and values as Transformers writes them (per-expert tensors of a Mixtral)."""
    model = tiny.mixtral()
    graft = ours(model, "lora", r=2, target_modules=["q_proj"])
    write_merged(graft, tmp_path / "m")
    graft.merge()
    graft_free = {k: v for k, v in model.state_dict().items() if ".graft." not in k}
    plain = tiny.mixtral()
    plain.load_state_dict(graft_free)
    plain.save_pretrained(tmp_path / "theirs")
    mine, theirs = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert sorted(mine) == sorted(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_shards_and_dtype(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=2)
    report = write_merged(graft, tmp_path / "m", dtype="bf16", shard_bytes=60_000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "m" / "model.safetensors.index.json").exists()
    again = reload(tmp_path / "m")
    assert next(again.parameters()).dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj"
    exact = model.get_submodule(name).weight + graft.delta_weights()[name]
    assert torch.equal(again.get_submodule(name).weight, exact.bfloat16())
    lost = (exact.bfloat16().float() - exact).norm() / graft.delta_weights()[name].norm()
    assert abs(report.errors[name] - float(lost)) < 1e-6 and report.worst > 1e-4


@pytest.fixture
def quantized(tmp_path):
    """(model on NF4 with a graft, folder of its base, with a licence)"""
    folder = tiny.save(tiny.llama(), tmp_path / "base")
    (folder / "LICENSE").write_text("licence of the base")
    model, tokenizer = graftwork.load(folder, storage="nf4")
    return model, tokenizer, folder


def test_quantized_base_merges_into_what_it_was_trained_on(quantized, tmp_path):
    model, tokenizer, folder = quantized
    graft = ours(model, "lora", r=2, target_modules=["q_proj", "up_proj"])
    write_merged(graft, tmp_path / "trained", tokenizer=tokenizer)
    write_merged(graft, tmp_path / "pristine", base="pristine")
    assert (tmp_path / "trained" / "LICENSE").read_text() == "licence of the base"
    torch.testing.assert_close(logits(reload(tmp_path / "trained")), logits(model), atol=1e-5, rtol=1e-5)
    dense, _ = load_model(folder)
    second = ours(dense, "lora", r=2, target_modules=["q_proj", "up_proj"])
    assert all(torch.equal(a.lora_B, graft.adapters[n].lora_B) for n, a in second.adapters.items())
    torch.testing.assert_close(logits(reload(tmp_path / "pristine")), logits(dense), atol=1e-5, rtol=1e-5)
    assert (logits(dense) - logits(model)).abs().max() > 1e-2


def test_flora_on_pristine_weights_masks_those(quantized, tmp_path):
    model, _, folder = quantized
    graft = ours(model, "flora", r=1, target_modules=["v_proj"])
    write_merged(graft, tmp_path / "m", base="pristine")
    dense, _ = load_model(folder)
    other = graftwork.attach(dense, "flora", r=1, target_modules=["v_proj"])
    for name, adapter in other.adapters.items():
        adapter.load_state_dict(graft.adapters[name].state_dict())
    torch.testing.assert_close(logits(reload(tmp_path / "m")), logits(dense), atol=1e-5, rtol=1e-5)


def test_qpissa_merges_on_both_bases(quantized, tmp_path):
    model, _, folder = quantized
    graft = graftwork.attach(model, "lora", r=2, initializer="pissa", target_modules=["q_proj"])
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    write_merged(graft, tmp_path / "trained")
    torch.testing.assert_close(logits(reload(tmp_path / "trained")), logits(model), atol=1e-5, rtol=1e-5)
    write_merged(graft, tmp_path / "pristine", base="pristine")
    again = reload(tmp_path / "pristine")
    dense, _ = load_model(folder)
    for name, adapter in graft.adapters.items():
        start, now = adapter.lora_B0 @ adapter.lora_A0, adapter.scale * adapter.lora_B @ adapter.lora_A
        exact = dense.get_submodule(name).weight - start + now
        torch.testing.assert_close(again.get_submodule(name).weight, exact, atol=1e-5, rtol=1e-5)


def test_requantize_is_refused_where_it_destroys_the_change(quantized, tmp_path):
    model, _, _ = quantized
    graft = fill(graftwork.attach(model, "lora", r=2, target_modules=["q_proj"]), size=0.01)
    with pytest.raises(GraftworkError, match="would lose"):
        write_merged(graft, tmp_path / "m", requantize=True)
    assert not (tmp_path / "m").exists()
    report = write_merged(graft, tmp_path / "m", requantize=True, force=True)
    assert report.worst > 0.5 and report.target == "requantized"
    again = graftwork.load(tmp_path / "m", storage="nf4")[0]
    dense = reload(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(again.get_submodule(name).dequantize(), dense.get_submodule(name).weight, atol=2e-3, rtol=1e-2)
    with pytest.raises(UsageError):
        write_merged(graft, tmp_path / "n", requantize=True, base="pristine")


def test_what_cannot_be_merged_is_refused(tmp_path):
    model = tiny.llama()
    graft = ours(model, "lora", r=2, bias="lora_only", target_modules=["q_proj"])
    with pytest.raises(IncompatibleError, match="no bias"):
        write_merged(graft, tmp_path / "m")
    with pytest.raises(GraftworkError, match="no files"):
        write_merged(ours(tiny.llama(), "lora", r=2), tmp_path / "m", base="pristine")
    merged = ours(tiny.llama(), "lora", r=2)
    merged.merge()
    with pytest.raises(UsageError, match="is merged"):
        write_merged(merged, tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(GraftworkError, match="exists already"):
        write_merged(ours(tiny.llama(), "lora", r=2), tmp_path / "full")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["full"]'


# -- lora -------------------------------------------------------------------------------------------------------------------
LORAS = {
    "paca": ("llama", "paca", dict(r=3, alpha=4)), "nola": ("qwen3", "nola", dict(r=2, n_basis=4)),
    "slices": ("gpt2", "lora", dict(r=2, bias="lora_only", target_modules="q,v", alpha=3)),
    "patterns": ("llama", "lora", dict(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)),
    "experts": ("mixtral", "lora", dict(r=2, alpha=1)),
}


@pytest.mark.parametrize("case", LORAS)
def test_any_low_rank_graft_becomes_a_lora_artifact(case, tmp_path):
    kind, method, options = LORAS[case]
    model = tiny.CAUSAL[kind]()
    graft = ours(model, method, **options)
    wanted = logits(model)
    assert write_lora(graft, tmp_path / "x")["error"] == 0.0
    assert torch.equal(logits(model), wanted)
    other = tiny.CAUSAL[kind]()
    again = graftwork.attach_saved(other, tmp_path / "x")
    assert again.method == "lora" and all(a.scale == 1.0 for a in again.adapters.values())
    torch.testing.assert_close(logits(other), wanted, atol=1e-5, rtol=1e-5)


def test_qpissa_becomes_a_lora_of_rank_2r_on_the_pristine_base(quantized, tmp_path):
    model, _, folder = quantized
    graft = graftwork.attach(model, "lora", r=2, initializer="pissa", target_modules=["q_proj"])
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    write_lora(graft, tmp_path / "x")
    dense, _ = load_model(folder)
    again = graftwork.attach_saved(dense, tmp_path / "x")
    for name, adapter in graft.adapters.items():
        exact = adapter.scale * adapter.lora_B @ adapter.lora_A - adapter.lora_B0 @ adapter.lora_A0
        torch.testing.assert_close(again.delta_weights()[name], exact, atol=1e-5, rtol=1e-5)
        assert again.adapters[name].r == 4


# -- mlx --------------------------------------------------------------------------------------------------------------------
def test_mlx_folder_under_mlx_lms_rules(tmp_path):
    model = tiny.llama(num_hidden_layers=3)
    graft = ours(model, "lora", r=3, alpha=5, use_rslora=True, rank_pattern={"k_proj": 1},
                 target_modules=["q_proj", r"layers.1.self_attn.k_proj"], layers_to_transform=[1, 2])
    write_mlx(graft, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert parameters["rank"] == 3 and parameters["keys"] == ["self_attn.k_proj", "self_attn.q_proj"]
    tensors = load_file(tmp_path / "x" / "adapters.safetensors")
    wanted = {f"model.layers.{layer}.{key}.lora_{ab}" for layer in (1, 2) for key in parameters["keys"] for ab in "ab"}
    assert set(tensors) == wanted  # mlx-lm wraps every key of the last num_layers blocks
    changes = graft.delta_weights()
    for layer in (1, 2):
        for key in parameters["keys"]:
            name = f"model.layers.{layer}.{key}"
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            assert a.shape == (64, 3) and b.shape[0] == 3
            change = parameters["scale"] * (torch.eye(64) @ a @ b).T  # y += scale * (x a) b
            torch.testing.assert_close(change, changes.get(name, torch.zeros_like(change)), atol=1e-6, rtol=1e-5)


def test_what_mlx_cannot_hold_is_refused(tmp_path):
    for model, options, words in ((tiny.gpt2(), dict(r=2), "gpt2"),
                                  (tiny.qwen3(), dict(r=2, target_modules=["lm_head"]), "lm_head"),
                                  (tiny.llama(), dict(r=2, bias="lora_only"), "biases")):
        with pytest.raises(IncompatibleError, match=words):
            write_mlx(ours(model, "lora", **options), tmp_path / "x")
        assert not (tmp_path / "x").exists()


# -- the verbs --------------------------------------------------------------------------------------------------------------
def graft_command(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line, in this process."""
    from graftwork.cli import main

    main.app.registered_commands.clear()
    try:
        main.main([str(a) for a in arguments])
        code = 0
    except SystemExit as leave:
        code = leave.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def saved(quantized, tmp_path):
    """(model on NF4 with the graft attached, folder of a run that holds it)"""
    model, _, _ = quantized
    graft = ours(model, "lora", r=2, alpha=3, target_modules=["q_proj", "v_proj"])
    graft.save(tmp_path / "run" / "graft")
    return model, tmp_path / "run"


@pytest.mark.slow
def test_merge_and_convert_from_the_command_line(saved, tmp_path, capsys):
    model, run = saved
    wanted = logits(model)
    code, out, err = graft_command(capsys, "merge", run, "-o", tmp_path / "m", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["error"] < 1e-4 and "model.safetensors" in result["files"] and "LICENSE" in result["files"]
    torch.testing.assert_close(logits(reload(tmp_path / "m")), wanted, atol=1e-4, rtol=1e-4)
    expected = {"peft": "adapter_model.safetensors", "vllm": "adapter_model.safetensors", "lora": "graft.safetensors",
                "gguf": "Modelfile", "gguf-merged": "model.gguf", "mlx": "adapters.safetensors", "merged": "config.json"}
    for target, file in expected.items():
        code, out, err = graft_command(capsys, "convert", run / "graft", "--to", target, "-o", tmp_path / target, "--json")
        assert code == 0, err
        assert file in json.loads(out)["files"] and json.loads(out)["to"] == target
    assert "TEMPLATE" in (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "gguf-merged" / "Modelfile").read_text()
    code, out, err = graft_command(capsys, "convert", tmp_path / "peft", "--to", "lora", "-o", tmp_path / "again")
    assert code == 0 and "exact" in out, err  # PEFT's folders are read too; its base is found by the name it keeps


def test_verbs_tell_what_is_wrong(saved, tmp_path, capsys):
    _, run = saved
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    cases = [(("convert", run, "--to", "gguff", "-o", tmp_path / "o"), 2, "did you mean 'gguf'"),
             (("convert", run, "--to", "merged", "--rank", "4", "-o", tmp_path / "o"), 2, "--rank does nothing"),
             (("convert", run, "--to", "peft", "--dtype", "bf16", "-o", tmp_path / "o"), 2, "--dtype does nothing"),
             (("convert", run, "--to", "peft", "--rank", "0", "-o", tmp_path / "o"), 2, "rank 0"),
             (("merge", run, "--force", "-o", tmp_path / "o"), 2, "--requantize"),
             (("merge", run, "--base", "best", "-o", tmp_path / "o"), 2, "no base 'best'"),
             (("merge", tmp_path / "nothing", "-o", tmp_path / "o"), 2, "no folder"),
             (("merge", run, "-o", tmp_path / "full"), 1, "exists already"),
             (("merge", run, "--model", tmp_path / "nowhere", "-o", tmp_path / "o"), 1, "no model")]
    for arguments, code, words in cases:
        found, out, err = graft_command(capsys, *arguments)
        assert found == code and words in err and "remedy:" in err and not out, (arguments, found, err)
    assert not (tmp_path / "o").exists() and (tmp_path / "full" / "x").exists()


def test_truncating_convert_reports_its_error(saved, tmp_path, capsys):
    _, run = saved
    code, out, _ = graft_command(capsys, "convert", run, "--to", "vllm", "--rank", "1", "-o", tmp_path / "o")
    assert code == 0 and "rank 1, error" in out and "%" in out
    code, _, _ = graft_command(capsys, "convert", run, "--to", "vllm", "-o", tmp_path / "o", "--overwrite")
    assert code == 0 and json.loads((tmp_path / "o" / "adapter_config.json").read_text())["r"] == 2


def test_saved_head_finds_its_number_of_labels(tmp_path, capsys):
    tiny.save(tiny.bert(), tmp_path / "base")
    model, _ = load_model(tmp_path / "base", task="classification", num_labels=4)
    graft = ours(model, "lora", r=2, target_modules=["query"], modules_to_save=["classifier"])
    wanted = logits(model)
    graft.save(tmp_path / "x")
    loaded, _, _ = open_saved(tmp_path / "x")
    assert torch.equal(logits(loaded), wanted) and loaded.config.num_labels == 4
    code, _, err = graft_command(capsys, "merge", tmp_path / "x", "-o", tmp_path / "m")
    assert code == 0, err
    from transformers import AutoModelForSequenceClassification
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
