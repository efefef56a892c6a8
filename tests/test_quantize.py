"""`graft quantize`: folders of codes, written block by block, read with the codes kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftwork
import tiny
from graftwork.compression import quantize as module
from graftwork.compression.quantize import quantize
from graftwork.data.calibration import calibration_rows
from graftwork.errors import DataError, GraftworkError, ModelError, UsageError
from graftwork.modeling.fingerprint import fingerprint
from graftwork.modeling.models import load_model
from graftwork.planning.ledger import Ledger
from graftwork.registry import make_config
from graftwork.storage import Storage, apply_storage, storage_bits
from published_support import nf4_values

TEXTS = [f"the answer to question {i} is {i * 7 % 31}, and it is not {i % 5}." for i in range(60)]
GPTQ = {"method": "int4", "group_size": 16, "calibration": "gptq"}
CALIBRATION = {"data": TEXTS, "samples": 6, "length": 24}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save(tiny.llama(num_hidden_layers=3), tmp_path_factory.mktemp("dense") / "m")


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def states(model):
    return {name: tensor for name, tensor in model.state_dict().items()}


def same(left, right):
    left, right = states(left), states(right)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def rows(folder):
    return calibration_rows(TEXTS, tiny.tokenizer(), samples=6, length=24)


@pytest.mark.slow
def test_a_folder_equals_the_model_in_memory_bit_for_bit(dense, tmp_path):
    report = quantize(dense, tmp_path / "q", storage=GPTQ, **CALIBRATION)
    expected, _ = load_model(dense)
    apply_storage(expected, make_config("storage", "int4", group_size=16, calibration="gptq"),
                  batches=rows(dense).batches)
    loaded, tokenizer = graftwork.load(tmp_path / "q")
    same(loaded, expected)
    with torch.no_grad():
        ids = tiny.tokens()
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert tokenizer is not None and loaded.graft_storage == expected.graft_storage
    assert fingerprint(loaded) == fingerprint(load_model(dense)[0])  # the same base
    assert report.bits_per_weight == storage_bits(loaded) and report.bytes_after < report.bytes_before and report.maps == 21
    assert not (tmp_path / "q" / "quantize-state.json").exists() and not loaded.config.to_dict().get("quantization_config")
    with pytest.raises(UsageError, match="codes already"):
        graftwork.load(tmp_path / "q", storage="nf4")
    assert graftwork.load(tmp_path / "q", storage=GPTQ)[0].graft_storage == loaded.graft_storage
    with pytest.raises(ModelError, match="quantized already"):
        quantize(tmp_path / "q", tmp_path / "again", storage="int4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral", "bert"])
@pytest.mark.parametrize("storage", ["nf4", GPTQ], ids=["nf4", "gptq"])
def test_every_architecture(name, storage, tmp_path):
    task = "encoder" if name == "bert" else "causal_lm"
    folder = tiny.save(tiny.ALL[name](), tmp_path / "m")
    calibrated = storage is GPTQ
    quantize(folder, tmp_path / "q", storage=storage, task=task, **(CALIBRATION if calibrated else {}))
    expected, _ = load_model(folder, task=task)
    options = dict(storage) if calibrated else {"method": storage}
    apply_storage(expected, make_config("storage", options.pop("method"), **options), notes=[],
                  batches=rows(folder).batches if calibrated else None)
    loaded, _ = load_model(tmp_path / "q", task=task)
    same(loaded, expected)
    assert fingerprint(loaded) == fingerprint(load_model(folder, task=task)[0])
    fake, _ = load_model(tmp_path / "q", task=task, fake=True)
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()}


@pytest.mark.slow
def test_bf16_and_another_head(tmp_path):
    folder = tiny.save(tiny.llama(dtype=torch.bfloat16), tmp_path / "m")
    quantize(folder, tmp_path / "q", storage=GPTQ, **CALIBRATION)
    expected, _ = load_model(folder)
    apply_storage(expected, make_config("storage", "int4", group_size=16, calibration="gptq"), batches=rows(folder).batches)
    loaded, _ = load_model(tmp_path / "q")
    same(loaded, expected)
    assert loaded.dtype == torch.bfloat16 and loaded.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    wide, _ = load_model(tmp_path / "q", dtype="fp32")
    assert wide.model.embed_tokens.weight.dtype == torch.float32 and wide.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    classifier, _ = load_model(tmp_path / "q", task="classification", num_labels=3)
    assert classifier.graft_new_weights == ["score.weight"] and classifier.score.weight.shape == (3, tiny.HIDDEN)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, Storage)
    encoder, _ = load_model(tmp_path / "q", task="encoder")
    assert torch.equal(encoder.layers[1].mlp.up_proj.codes, loaded.model.layers[1].mlp.up_proj.codes)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", GPTQ], ids=["int8", "gptq"])
def test_a_kill_at_any_block_leaves_the_same_files_in_the_end(dense, tmp_path, storage):
    given = CALIBRATION if storage is GPTQ else {}
    quantize(dense, tmp_path / "whole", storage=storage, **given)

    def stop_after(blocks):
        def progress(done, total):
            if done == blocks:
                raise Killed
        return progress

    for blocks in (1, 3):
        with pytest.raises(Killed):
            quantize(dense, tmp_path / "cut", storage=storage, progress=stop_after(blocks), **given)
        with pytest.raises(ModelError, match="half written"):
            graftwork.load(tmp_path / "cut")
    with pytest.raises(UsageError, match="half written with another .*storage"):
        quantize(dense, tmp_path / "cut", storage="nf4")
    report = quantize(dense, tmp_path / "cut", storage=storage, **given)
    assert report.resumed == 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_is_continued(dense, tmp_path):
    script = ("import os, sys; sys.path.insert(0, 'tests'); import tiny; from graftwork.compression.quantize import quantize\n"
              "def stop(done, total):\n    if done == 2: os.kill(os.getpid(), 9)\n"
              f"quantize({str(dense)!r}, {str(tmp_path / 'cut')!r}, storage={GPTQ!r}, progress=stop, data={TEXTS!r}, samples=6, length=24)")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == -9 and len(list((tmp_path / "cut").glob("model-*"))) == 2
    quantize(dense, tmp_path / "cut", storage=GPTQ, **CALIBRATION)
    quantize(dense, tmp_path / "whole", storage=GPTQ, **CALIBRATION)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    from safetensors import safe_open

    for file in (tmp_path / "whole").glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}  # two keys would be written in any order, and equal shards differ


def peak_of(folder, output, **options):
    with Ledger(device="cpu") as ledger:
        quantize(folder, output, **options)
    return ledger.peak_bytes


@pytest.mark.slow
def test_one_block_is_in_memory_at_a_time(tmp_path):
    model = tiny.llama(num_hidden_layers=12)
    size, block = (sum(p.numel() * p.itemsize for p in m.parameters()) for m in (model, model.model.layers[0]))
    folder = tiny.save(model, tmp_path / "m")
    del model
    assert peak_of(folder, tmp_path / "q", storage={"method": "int4", "group_size": 16}) < 0.16 * size
    with Ledger(device="cpu") as ledger:
        loaded, _ = load_model(tmp_path / "q")
    kept = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert ledger.peak_bytes < 1.4 * kept < 0.5 * size
    with Ledger(device="cpu") as ledger:  # in memory, too, a weight that is stored is let go
        dense, _ = load_model(folder)
        ledger.track(dense)
        apply_storage(dense, make_config("storage", "int4", group_size=16))
    assert ledger.live_bytes < 0.5 * size
    few, more = (tiny.save(tiny.llama(num_hidden_layers=n), tmp_path / f"m{n}") for n in (2, 4))
    calibrated = dict(storage=GPTQ, data=TEXTS, samples=1, length=16)
    assert peak_of(more, tmp_path / "q4", **calibrated) < peak_of(few, tmp_path / "q2", **calibrated) + block / 4


def test_refusals(dense, tmp_path):
    with pytest.raises(UsageError, match="no option 'grup_size'.*group_size"):
        quantize(dense, tmp_path / "q", storage={"method": "int4", "grup_size": 8})
    with pytest.raises(UsageError, match="keeps the weights"):
        quantize(dense, tmp_path / "q", storage="dense")
    with pytest.raises(UsageError, match="none is given"):
        quantize(dense, tmp_path / "q", storage=GPTQ)
    with pytest.raises(UsageError, match="reads no data"):
        quantize(dense, tmp_path / "q", storage="int4", data=TEXTS)
    with pytest.raises(DataError, match="fewer than one row"):
        quantize(dense, tmp_path / "q", storage=GPTQ, data=["short"], length=64)
    with pytest.raises(UsageError, match="context of 256"):
        quantize(dense, tmp_path / "q", storage=GPTQ, data=TEXTS, length=512)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(GraftworkError, match="not empty"):
        quantize(dense, tmp_path / "full", storage="int4")
    assert (tmp_path / "full" / "keep.txt").read_text() == "mine" and not (tmp_path / "q").exists()


@pytest.mark.slow
def test_damaged_models_and_a_full_disk_lose_nothing(dense, tmp_path, monkeypatch):
    broken = tiny.llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    folder = tiny.save(broken, tmp_path / "m")
    with pytest.raises(UsageError, match="layers.1.mlp.down_proj.*NaN"):
        quantize(folder, tmp_path / "nan", storage="int4")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(GraftworkError, match="no space left"):
        quantize(dense, tmp_path / "q", storage="int4")
    monkeypatch.undo()
    quantize(dense, tmp_path / "q", storage="int4")  # continues
    loaded, _ = load_model(tmp_path / "q")
    same(loaded, apply_storage(load_model(dense)[0], make_config("storage", "int4")))
    lines = (tmp_path / "q" / "pristine.json")
    lines.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_model(tmp_path / "q")


@pytest.mark.slow
def test_adapters_train_on_a_folder_and_know_their_base(dense, tmp_path):
    from graftwork.planning.simulate import plan
    from graftwork.training.run import train_recipe

    quantize(dense, tmp_path / "q", storage=GPTQ, **CALIBRATION)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": text[:20], "completion": text[20:]}) + "\n" for text in TEXTS[:8]))
    recipe = {"model": str(tmp_path / "q"), "adapter": {"method": "lora", "r": 2}, "data": {"train": str(data), "max_length": 64},
              "train": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}, "output_dir": str(tmp_path / "run")}
    before = contents(tmp_path / "q")
    assert plan(recipe, estimate_time=False).categories["weights"] > 0
    train_recipe(recipe, quiet=True)
    card = json.loads((tmp_path / "run" / "graft" / "graft.json").read_text())
    assert card["storage"]["method"] == "int4" and card["base"]["fingerprint"] == fingerprint(load_model(dense)[0])
    from graftwork.interchange.opening import open_saved

    model, _, graft = open_saved(tmp_path / "run" / "graft")
    assert isinstance(model.model.layers[0].mlp.up_proj, Storage) and contents(tmp_path / "q") == before
    with pytest.raises(GraftworkError, match="frozen codes"):
        train_recipe({**recipe, "adapter": None, "output_dir": str(tmp_path / "full")}, quiet=True)


@pytest.mark.slow
def test_the_command_line(dense, tmp_path, capsys):
    from graftwork.cli.main import main

    text = tmp_path / "t.txt"
    text.write_text("\n".join(TEXTS))
    main(["quantize", str(dense), "--storage", "int3", "--group-size", "32", "--calibration", "gptq", "calibration.damp=0.05",
          "symmetric=true", "--data", str(text), "--samples", "200", "--length", "32", "-o", str(tmp_path / "q"), "--json"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["storage"]["calibration"]["damp"] == 0.05 and report["storage"]["group_size"] == 32 and report["storage"]["symmetric"]
    assert "not 200" in err and "3 of 3 blocks" in err and report["bits_per_weight"] == 3.5
    main(["quantize", str(dense), "--storage", "nf4", "-o", str(tmp_path / "n"), "--quiet"])
    assert "bits a weight" in capsys.readouterr().out
    for words in (["--storage", "nf4", "--group-size", "8"], ["--storage", "int4", "damp=1"], ["--storage", "int4", "calibration.damp=1"]):
        with pytest.raises(SystemExit):
            main(["quantize", str(dense), *words, "-o", str(tmp_path / "x")])
        assert "error:" in capsys.readouterr().err
    assert module.VERSION and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_recipe_calibrates_on_its_own_data_and_what_it_saved_finds_these_codes_again(dense, tmp_path):
    from graftwork.evaluation.targets import find_target, load_target
    from graftwork.interchange.opening import open_saved
    from graftwork.planning.simulate import plan
    from graftwork.serving.loading import load_with_adapters
    from graftwork.training.run import train_recipe

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": text[:20], "completion": text[20:]}) + "\n" for text in TEXTS[:12]))
    recipe = {"model": str(dense), "storage": GPTQ, "adapter": {"method": "lora", "r": 2}, "output_dir": str(tmp_path / "run"),
              "data": {"train": str(data), "max_length": 64, "calibration_rows": 6},
              "train": {"max_steps": 2, "batch_size": 2, "precision": "fp32"}}
    assert any("not in the peak" in note for note in plan(recipe, estimate_time=False).notes)
    result = train_recipe(recipe, quiet=True)
    trained = {n: m.codes for n, m in result.model.named_modules() if isinstance(m, Storage)}
    more = dict(recipe, data={**recipe["data"], "calibration_rows": 12}, output_dir=str(tmp_path / "more"))
    other = {n: m.codes for n, m in train_recipe(more, quiet=True).model.named_modules() if isinstance(m, Storage)}
    assert any((other[n] != trained[n]).any() for n in trained)
    for model in (open_saved(tmp_path / "run" / "graft")[0], load_target(find_target(tmp_path / "run"))[0],
                  load_with_adapters(str(dense), {"a": tmp_path / "run" / "graft"})[0]):
        found = {n: m.codes for n, m in model.named_modules() if isinstance(m, Storage)}
        assert found.keys() == trained.keys() and all(torch.equal(found[n], trained[n]) for n in found)
    quantize(dense, tmp_path / "int8", storage="int8")  # a folder of other codes keeps them, and says so
    said = []
    served, _ = load_with_adapters(str(tmp_path / "int8"), {"a": tmp_path / "run" / "graft"}, say=said.append)
    with pytest.warns(UserWarning, match="attached to int8"):
        opened, _, _ = open_saved(tmp_path / "run" / "graft", model=tmp_path / "int8")
    assert served.graft_storage.method == opened.graft_storage.method == "int8" and "attached to int8" in "".join(said)
    result.grafts[0].merge(requantize=True, force=True)
    data.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        open_saved(tmp_path / "run" / "graft")


@pytest.mark.slow
def test_load_takes_calibration_data(dense, tmp_path):
    found, _ = graftwork.load(dense, storage=GPTQ, calibration_data=TEXTS, samples=6, length=24)
    quantize(dense, tmp_path / "q", storage=GPTQ, **CALIBRATION)
    same(found, graftwork.load(tmp_path / "q")[0])
    for options, words in (({"storage": GPTQ}, "no such data"), ({"calibration_data": TEXTS}, "without a storage"),
                           ({"storage": "int4", "calibration_data": TEXTS}, "reads no data"),
                           ({"storage": GPTQ, "calibration_data": [3]}, "holds int")):
        with pytest.raises(UsageError, match=words):
            graftwork.load(dense, **options)


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [True, False])
def test_published_nf4_checkpoints_load_with_their_codes(dense, tmp_path, double_quant):
    functional = pytest.importorskip("bitsandbytes").functional
    from safetensors.torch import load_file, save_file

    folder, model = tmp_path / "bnb", load_model(dense)[0]
    tiny.tokenizer().save_pretrained(folder)
    tensors = load_file(dense / "model.safetensors")
    for name, _ in list(model.named_parameters()):
        if ".layers." in name and name.endswith("proj.weight"):
            codes, state = functional.quantize_4bit(tensors[name], blocksize=64, quant_type="nf4", compress_statistics=double_quant)
            tensors |= {name: codes, **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}}
            with torch.no_grad():
                model.get_parameter(name).copy_(nf4_values(codes, state))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                     "bnb_4bit_use_double_quant": double_quant, "llm_int8_skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded, tokenizer = graftwork.load(folder)
    up = loaded.model.layers[1].mlp.up_proj
    assert type(up).method == "nf4" and torch.equal(up.dequantize(), model.model.layers[1].mlp.up_proj.weight) and tokenizer is not None
    assert torch.equal(up.codes, tensors["model.layers.1.mlp.up_proj.weight"].view(-1))
    with torch.no_grad():
        ids = tiny.tokens()
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert fingerprint(loaded) == fingerprint(load_model(folder)[0]) != fingerprint(load_model(dense)[0])
    fake, _ = load_model(folder, fake=True)
    assert {n: p.shape for n, p in fake.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    config["quantization_config"] = {"quant_method": "awq", "bits": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already .awq"):
        load_model(folder)
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="absmax missing"):
        load_model(folder)
