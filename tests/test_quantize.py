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
    with pytest.raises(UsageError, match="half written with another storage"):
        quantize(dense, tmp_path / "cut", storage="nf4")
    report = quantize(dense, tmp_path / "cut", storage=storage, **given)
    assert report.resumed == 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_is_continued(dense, tmp_path):
    script = ("import os, sys; import tiny; from graftwork.compression.quantize import quantize\n"
              "def stop(done, total):\n    if done == 2: os.kill(os.getpid(), 9)\n"
              f"quantize({str(dense)!r}, {str(tmp_path / 'cut')!r}, storage={GPTQ!r}, progress=stop, data={TEXTS!r}, samples=6, length=24)")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == -9 and len(list((tmp_path / "cut").glob("model-*"))) == 2
    quantize(dense, tmp_path / "cut", storage=GPTQ, **CALIBRATION)
    quantize(dense, tmp_path / "whole", storage=GPTQ, **CALIBRATION)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_one_block_is_in_memory_at_a_time(tmp_path):
    model = tiny.llama(num_hidden_layers=16, hidden_size=128, intermediate_size=384)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    folder = tiny.save(model, tmp_path / "m")
    del model
    calibrated = dict(storage=GPTQ, data=TEXTS, samples=2, length=16)
    with Ledger() as ledger:
        quantize(folder, tmp_path / "q", **calibrated)
    assert ledger.peak_bytes < 0.25 * size, (ledger.peak_bytes, size)
    with Ledger() as ledger:
        quantize(folder, tmp_path / "q8", storage="int8")
    assert ledger.peak_bytes < 0.25 * size
    with Ledger() as ledger:
        loaded, _ = load_model(tmp_path / "q")
    kept = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert ledger.peak_bytes < 1.6 * kept < 0.6 * size


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
