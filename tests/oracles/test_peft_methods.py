"""PEFT's folders of methods beside LoRA, both ways: what we write computes the same in PEFT, what it writes computes the same here."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.errors import ArtifactError, IncompatibleError, UsageError
from graftwork.interchange.peft import read_config, write_peft
from graftwork.interchange.peft_methods import EXCHANGES

IDS = tiny.tokens(2, 7)
CONFIGS = {"dora": peft.LoraConfig, "ia3": peft.IA3Config, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "oft": peft.OFTConfig}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 7.0}}
WRITTEN = {
    "dora": ("llama", "dora", dict(r=4, alpha=6.0, target_modules="attention")),
    "dora patterns": ("llama", "dora", dict(r=4, alpha=6.0, use_rslora=True, **PATTERNS)),
    "dora Conv1D": ("gpt2", "dora", dict(r=3, alpha=2.0)),
    "ia3": ("llama", "ia3", dict(target_modules="k,v,down")),
    "ia3 everywhere": ("qwen3", "ia3", {}),
    "ia3 no feed-forward": ("llama", "ia3", dict(target_modules=["k_proj", "v_proj"])),
    "ia3 Conv1D": ("gpt2", "ia3", {}),
    "ia3 names that end alike": ("bert", "ia3", dict(target_modules=["key", "output.dense"], feedforward_modules=["layer.1.output.dense"])),
    "loha": ("llama", "loha", dict(r=2, alpha=3.0)),
    "loha patterns": ("llama", "loha", dict(r=3, **PATTERNS)),
    "lokr": ("llama", "lokr", dict(r=3, alpha=5.0)),
    "lokr forms": ("llama", "lokr", dict(r=2, decompose_both=True, decompose_factor=4, **PATTERNS)),
    "oft": ("llama", "oft", dict(block_size=8)),
    "oft series, shared": ("llama", "oft", dict(block_size=16, block_share=True, neumann_terms=6)),
    "oft equal counts": ("llama", "oft", dict(block_size=16, block_size_pattern={"down_proj": 24}, target_modules=["q_proj", "down_proj"])),
}


def through_peft(model, folder):
    """The model with the folder attached by PEFT; any key that PEFT misses or does not expect fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("error", message=".*Invalid.*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def test_every_method_of_the_table_is_tested():
    assert {method for _, method, _ in WRITTEN.values()} == set(CONFIGS) == set(EXCHANGES) - {"lora"}


@pytest.mark.parametrize("case", WRITTEN)
@torch.no_grad()
def test_written_here_read_by_peft_and_again_here(case, tmp_path):
    kind, method, options = WRITTEN[case]
    model = tiny.ALL[kind]()
    before = output(model, IDS)
    graft = attach(model, method, **options)
    wanted = output(model, IDS)
    assert (wanted - before).abs().max() > 1e-2
    report = write_peft(graft, tmp_path / "x")
    assert report["error"] == 0.0 and report["rank"] == options.get("r")
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert set(written) == set(EXCHANGES[method].template)
    twin = through_peft(tiny.ALL[kind](), tmp_path / "x")
    close(output(twin, IDS), wanted, 1e-5)
    again = tiny.ALL[kind]()
    back = graftwork.attach_saved(again, tmp_path / "x")
    assert back.method == method and back.adapters.keys() == graft.adapters.keys()
    close(output(again, IDS), wanted, 1e-5)
    if method != "ia3":  # whose difference from one is rounded once
        read = dict(back.named_parameters(trainable=False))
        assert all(torch.equal(p, read.pop(name)) for name, p in graft.named_parameters()) and not read


READ = {
    "dora": ("llama", "dora", dict(use_dora=True, r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"],
                                   rank_pattern={"down_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3})),
    "dora rslora": ("gpt2", "dora", dict(use_dora=True, use_rslora=True, r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "ia3": ("llama", "ia3", dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 regex": ("llama", "ia3", dict(target_modules=r".*\.(k|down)_proj", feedforward_modules=r".*\.0\.mlp\.down_proj")),
    "ia3 ends within a part": ("llama", "ia3", dict(target_modules=r".*(k|down)_proj", feedforward_modules=["wn_proj"])),
    "ia3 gpt2": ("gpt2", "ia3", dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    "loha": ("llama", "loha", dict(r=3, alpha=4, target_modules="all-linear", rank_pattern={"v_proj": 2})),
    "lokr": ("llama", "lokr", dict(r=3, alpha=4, target_modules=["q_proj", "up_proj"], decompose_both=True)),
    "lokr whole": ("llama", "lokr", dict(r=32, alpha=4, target_modules=["q_proj", "up_proj"], decompose_factor=2)),
    "oft": ("llama", "oft", dict(oft_block_size=16, target_modules=["q_proj", "up_proj"], use_cayley_neumann=True)),
    "oft exact": ("llama", "oft", dict(oft_block_size=16, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)),
    "oft count": ("llama", "oft", dict(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"])),
    "oft changed size": ("llama", "oft", dict(oft_block_size=20, target_modules=["q_proj", "down_proj"], block_share=True)),
    "oft three terms": ("llama", "oft", dict(oft_block_size=8, target_modules=["q_proj"], num_cayley_neumann_terms=3)),
}


def written_by_peft(kind, method, folder, seed=1, **options):
    """(logits, model) of a PEFT model with random values, which is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.ALL[kind](), CONFIGS[method](**options)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in (p for p in theirs.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        theirs.save_pretrained(folder)
    with torch.no_grad():
        return output(theirs, IDS), theirs


@pytest.mark.parametrize("case", READ)
@torch.no_grad()
def test_written_by_peft_read_here(case, tmp_path):
    kind, method, options = READ[case]
    wanted, _ = written_by_peft(kind, method, tmp_path / "x", **options)
    model = tiny.ALL[kind]()
    before = output(model, IDS)
    graft = graftwork.attach_saved(model, tmp_path / "x")
    assert graft.method == method and (wanted - before).abs().max() > 1e-2
    close(output(model, IDS), wanted, 1e-5)
    graft.detach()
    assert torch.equal(output(model, IDS), before)


@pytest.mark.parametrize("method", CONFIGS)
def test_our_templates_are_pefts_defaults(method, tmp_path):
    extra = {"dora": {"use_dora": True}, "ia3": {"feedforward_modules": []}}.get(method, {})
    written_by_peft("llama", method, tmp_path / "x", target_modules=["q_proj"], **extra)
    theirs = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    own = {"target_modules", "auto_mapping", "base_model_name_or_path", "feedforward_modules"}
    template = EXCHANGES[method].template
    same = {k: v for k, v in theirs.items() if k not in own and k != "runtime_config"}
    assert {k: template[k] for k in same} == same


@pytest.mark.parametrize("options, words", [({"coft": True}, "coft=True"), ({"bias": "oft_only"}, "bias='oft_only'"),
                                            ({"num_cayley_neumann_terms": 2}, "terms=2")])
def test_what_is_not_read_is_refused_by_name(options, words, tmp_path):
    written_by_peft("llama", "oft", tmp_path / "x", target_modules=["q_proj"], **options)
    for read in (lambda: read_config(tmp_path / "x"), lambda: graftwork.attach_saved(tiny.llama(), tmp_path / "x")):
        with pytest.raises(ArtifactError, match=words) as caught:
            read()
        assert caught.value.remedy


def test_damage_is_found(tmp_path):
    from safetensors.torch import save_file

    written_by_peft("llama", "ia3", tmp_path / "x", target_modules=["q_proj"], feedforward_modules=[])
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second = sorted(tensors)
    save_file({first: tensors[first], second: tensors[second].T.contiguous()}, file)
    with pytest.raises(ArtifactError, match=r"expected \(64, 1\)"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "x")
    save_file({first: tensors[first]}, file)
    with pytest.raises(ArtifactError, match="missing tensor"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "x")


@torch.no_grad()
def test_where_peft_has_no_such_layer_the_exact_lora_is_written(tmp_path):
    """Conv1D and slices: LoHa and LoKr as LoRA of their rank, OFT only with a rank; a rank always asks for a LoRA."""
    for method in ("loha", "lokr"):
        model = tiny.gpt2()
        graft = attach(model, method, target_modules="q,v")
        wanted = output(model, IDS)
        assert write_peft(graft, tmp_path / method)["error"] == 0.0
        close(output(through_peft(tiny.gpt2(), tmp_path / method), IDS), wanted, 1e-5)
    with pytest.raises(UsageError, match="not low-rank"):
        write_peft(attach(tiny.gpt2(), "oft"), tmp_path / "oft")
    mixed = attach(tiny.llama(), "oft", block_size=16, block_size_pattern={"down_proj": 8})
    with pytest.raises(IncompatibleError, match=r"blocks of \[8, 16\]"):
        write_peft(mixed, tmp_path / "oft")
    assert 0 < write_peft(mixed, tmp_path / "oft", rank=8)["error"] < 1
    assert json.loads((tmp_path / "oft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
