"""Spectra of full tuning and of grafts that own parts of a coded base, against svdvals of differences of whole models in float64."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch

import graftwork
import tiny
from graftwork.errors import ModelError
from graftwork.modeling.source import ModelSource
from graftwork.report.build import write_report
from graftwork.report.runs import read_runs
from graftwork.report.spectra import evenly, graft_spectra, of_saved
from graftwork.report.whole import Change
from training_support import completions, folder, recipe, run


def moved(model, names, seed=0):
    """Adds noise to the named parameters, of rank 3 where they are matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                shape = parameter.shape
                parts = torch.randn(*shape[:-1], 3, generator=generator), torch.randn(3, shape[-1], generator=generator)
                parameter.add_((0.1 * parts[0] @ parts[1]).to(parameter.dtype))
    return model


def states(*models):
    return [{name: each.detach().clone() for name, each in model.named_parameters()} for model in models]


KINDS = {"llama": ("q_proj", "down_proj", "embed_tokens"), "gpt2": ("c_attn", "c_fc"), "mixtral": ("experts", "lm_head")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_those_of_the_whole_models(tmp_path, kind, dtype):
    """A bf16 run began with the base's fp32 weights rounded once; experts are matrices of their own."""
    base = getattr(tiny, kind)()
    tiny.save(base, tmp_path / "base")
    before = {name: each.to(dtype).double() for name, each in states(base)[0].items()}
    tuned = moved(base.to(dtype), KINDS[kind])
    tiny.save(tuned, tmp_path / "tuned")
    after = {name: each.double() for name, each in states(tuned)[0].items()}
    wanted = {}
    for name, each in after.items():
        if each.dim() > 1:
            parts = {f".{k}": part for k, part in enumerate(each - before[name])} if each.dim() == 3 else {"": each - before[name]}
            wanted.update({name.removesuffix(".weight") + end: part for end, part in parts.items() if part.any()})
    change = Change(tmp_path / "tuned", tmp_path / "base")
    found = {matrix.site: change.spectrum(matrix) for matrix in change.changed()}
    assert found.keys() == wanted.keys() and len(found) >= 3 and not change.without
    for site, part in wanted.items():
        values = torch.linalg.svdvals(part)
        np.testing.assert_allclose(found[site]["values"], values[:64].numpy(), rtol=1e-5, atol=1e-6 * values[0].item())
        assert found[site]["frobenius"] == pytest.approx(part.square().sum().sqrt().item(), rel=1e-6)
        assert found[site]["shape"] == list(part.shape)[::-1 if kind == "gpt2" and "h." in site else 1]
    assert any(numbers["effective_rank"] < 3.1 for numbers in found.values()) or dtype == torch.bfloat16


def test_one_weight_at_a_time(tmp_path, monkeypatch):
    base = tiny.llama()
    tiny.save(base, tmp_path / "base")
    tiny.save(moved(base, ("proj",)), tmp_path / "tuned")
    change, alive, most, read = Change(tmp_path / "tuned", tmp_path / "base"), [], [0], ModelSource.read

    def watched(self, name, *more, **options):
        tensor = read(self, name, *more, **options)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(ModelSource, "read", watched)
    for matrix in change.changed():
        change.spectrum(matrix)
    assert len(alive) > 20 and most[0] == 2


def test_a_new_head_has_nothing_to_be_compared_with(tmp_path):
    encoder = tiny.bert()
    tiny.save(encoder, tmp_path / "base")
    tuned, _ = graftwork.load(tmp_path / "base", task="classification", num_labels=3)
    tiny.save(moved(tuned, ("query",)), tmp_path / "tuned")
    change = Change(tmp_path / "tuned", tmp_path / "base", task="classification")
    assert change.without == ["classifier.weight"]
    assert [m.site for m in change.changed()] == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_names_of_evenly_spaced_layers():
    names = ["embed", *(f"layers.{i}.{part}" for i in range(9) for part in "qk")]
    layer = lambda name: int(name.split(".")[1]) if "." in name else -1  # noqa: E731
    assert evenly(names, 50, layer) == names
    some = evenly(names, 8, layer)
    assert some == ["embed", *(f"layers.{i}.{part}" for i in (0, 4, 8) for part in "qk")]
    assert evenly(names[1:], 4, layer) == ["layers.0.q", "layers.0.k", "layers.8.q", "layers.8.k"]
    assert evenly(["a", "b", "c"], 2, layer) == ["a", "b"] and evenly(names, 1, layer) == ["layers.0.q"]


@pytest.mark.slow
def test_a_run_by_the_verb(tmp_path, capsys):
    base = folder(tmp_path)
    run(recipe(base, completions(tmp_path / "d.jsonl"), tmp_path / "a", adapter=None, optimizer={"method": "adamw", "lr": 1e-3},
               train={"max_steps": 2}))
    of_saved(tmp_path / "a", sites=5, say=lambda text: None)
    one = read_runs([tmp_path / "a"])[0]
    before, after = states(graftwork.load(base, dtype="fp32")[0], graftwork.load(tmp_path / "a" / "model", dtype="fp32")[0])
    changed = [name for name in after if after[name].dim() > 1 and not torch.equal(after[name], before[name])]
    assert one.spectra["of"] == len(changed) and 1 < len(one.spectra["sites"]) <= 5
    for site, numbers in one.spectra["sites"].items():
        name = f"{site}.weight"
        values = torch.linalg.svdvals(after[name].double() - before[name].double()).numpy()
        np.testing.assert_allclose(numbers["values"], values[:64], rtol=1e-4, atol=1e-6 * values[0])
    report = write_report([tmp_path / "a"], tmp_path / "r.html")
    assert any(figure["name"] == "spectra" for figure in report["figures"])
    text = (tmp_path / "r.html").read_text()
    assert f"of {len(changed)} sites, of evenly spaced layers" in text and "W after training less W of" in text
    shutil.rmtree(base)
    with pytest.raises(ModelError) as error:
        of_saved(tmp_path / "a", sites=5, say=lambda text: None)
    assert str(tmp_path / "a") in error.value.message


def test_nothing_changed_and_a_base_of_codes(tmp_path):
    from graftwork.compression.quantize import quantize
    from graftwork.report.whole import write_changes

    tiny.save(tiny.llama(), tmp_path / "base")
    write_changes(tmp_path, tmp_path / "base", tmp_path / "base", task="causal_lm", sites=4)
    document = json.loads((tmp_path / "spectra.json").read_text())
    assert document["sites"] == {} and "no matrix differs" in document["left_out"]
    quantize(tmp_path / "base", tmp_path / "codes", storage="int4")
    with pytest.raises(ModelError, match="holds codes") as error:
        Change(tmp_path / "base", tmp_path / "codes")
    assert "--spectra" in error.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("method", ["peqa", "pv_tuning"])
def test_grafts_that_own_parts_of_a_coded_base(tmp_path, method):
    """The change of a site by what its map gives for unit vectors, with and without the graft."""
    tiny.save(tiny.llama(), tmp_path / "base")
    model, _ = graftwork.load(tmp_path / "base", storage={"method": "int4", "group_size": 32}, dtype="fp32")
    graft = graftwork.attach(model, method, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    found = dict(graft_spectra(graft, list(graft.adapters)))
    for site in graft.adapters:
        module, unit = model.get_submodule(site), torch.eye(tiny.HIDDEN)
        with torch.no_grad():
            learned = module(unit)
            with graft.disabled():
                change = (learned - module(unit)).double()
        values = torch.linalg.svdvals(change).numpy()
        np.testing.assert_allclose(found[site]["values"], values[:64], rtol=2e-4, atol=1e-4 * values[0])
