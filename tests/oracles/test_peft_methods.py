"""PEFT's folders of methods beside LoRA, both ways: what we write computes the same in PEFT, what it writes computes the same here."""

from __future__ import annotations

import json
import re
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
CONFIGS = {"dora": peft.LoraConfig, "ia3": peft.IA3Config, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "oft": peft.OFTConfig,
           "miss": peft.MissConfig, "bat": peft.MissConfig, "vera": peft.VeraConfig, "randlora": peft.RandLoraConfig,
           "adalora": peft.AdaLoraConfig, "kasa": peft.LoraConfig, "prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
PROMPTS = ("prompt", "prefix")
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
    "miss": ("llama", "miss", dict(r=5)),
    "miss, part of D": ("bert", "miss", dict(r=6, mini_r=8, target_modules=["query", "output.dense"])),
    "bat": ("llama", "bat", dict(r=8)),
    "vera": ("llama", "vera", dict(r=6, target_modules="q,v,down")),
    "vera, pair in the artifact": ("gpt2", "vera", dict(r=6, save_projection=True, target_modules=["c_fc", "mlp.c_proj"])),
    "randlora": ("llama", "randlora", dict(r=10, alpha=3.0, save_projection=True)),
    "randlora Conv1D": ("gpt2", "randlora", dict(r=10, save_projection=True, distribution="sparse", target_modules=["c_fc", "mlp.c_proj"])),
    "adalora": ("llama", "adalora", dict(r=4, alpha=6.0)),
    "adalora Conv1D": ("gpt2", "adalora", dict(r=3, target_modules=["c_fc", "mlp.c_proj"])),
    "kasa": ("llama", "kasa", dict(r=3, alpha=5.0)),
    "kasa ranks": ("bert", "kasa", dict(r=3, rank_pattern={"query": 2}, target_modules=["query", "output.dense"])),
    "prompt": ("llama", "prompt", dict(num_virtual_tokens=3)),
    "prompt gpt2": ("gpt2", "prompt", dict(num_virtual_tokens=5, init="random")),
    "prefix": ("llama", "prefix", dict(num_virtual_tokens=3)),
    "prefix of a network": ("gpt2", "prefix", dict(num_virtual_tokens=4, reparametrize=8)),
    "prefix, wide heads": ("qwen3", "prefix", dict(num_virtual_tokens=3)),
}


def through_peft(model, folder):
    """The model with the folder attached by PEFT; any key that PEFT misses or does not expect fails, but copies of a basis."""
    if json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "RANDLORA":
        with pytest.warns(UserWarning, match="missing adapter keys") as caught:
            twin = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        (text,) = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        assert not re.sub(r"'[\w.]+\.randlora_[AB]\.default'(, )?", "", text.partition("[")[2]).strip("].")
        return twin
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("error", message=".*Invalid.*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def of_text(model):
    """PEFT's outputs at the text; those at the virtual tokens of a prompt stand before them."""
    return output(model, IDS)[:, -IDS.shape[1]:]


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
    assert report["error"] == 0.0 and report["rank"] == options.get("r") and bool(report["notes"]) == (method == "randlora")
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert set(written) == set(EXCHANGES[method].template)
    twin = through_peft(tiny.ALL[kind](), tmp_path / "x")
    close(of_text(twin), wanted, 1e-5)
    again = tiny.ALL[kind]()
    back = graftwork.attach_saved(again, tmp_path / "x")
    assert back.method == method and back.adapters.keys() == graft.adapters.keys()
    close(output(again, IDS), wanted, 1e-5)
    if method not in ("ia3", "randlora") and not options.get("reparametrize"):  # whose values are rounded once, or made by a network
        read = dict(back.named_parameters(trainable=False))
        assert all(torch.equal(p, read.pop(name)) for name, p in graft.named_parameters())
        frozen = {"vera": {"A", "B"}, "kasa": {"A0", "B0"}}.get(method, set())
        assert {name.rpartition(".")[2] for name in read} == frozen


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
    "miss": ("llama", "miss", dict(r=5, target_modules=["q_proj", "down_proj"])),
    "miss mini": ("llama", "miss", dict(r=6, init_weights="mini", mini_r=8, target_modules=["q_proj", "down_proj"])),
    "miss bert": ("bert", "miss", dict(r=7, init_weights=False, target_modules=["query", "output.dense"])),
    "bat": ("bert", "bat", dict(r=8, init_weights="bat", target_modules=["query", "output.dense"])),
    "vera": ("llama", "vera", dict(r=6, target_modules=["q_proj", "v_proj", "down_proj"], projection_prng_key=5)),
    "vera gpt2": ("gpt2", "vera", dict(r=6, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    "vera from its seed": ("llama", "vera", dict(r=6, target_modules=["q_proj", "up_proj"], projection_prng_key=7, save_projection=False)),
    "randlora": ("llama", "randlora", dict(r=10, randlora_alpha=3, target_modules="all-linear")),
    "randlora sparse": ("llama", "randlora", dict(r=10, randlora_alpha=3, target_modules=["q_proj", "v_proj"], sparse=True)),
    "randlora gpt2": ("gpt2", "randlora", dict(r=9, randlora_alpha=3, target_modules=["c_attn", "mlp.c_proj"], very_sparse=True,
                                               fan_in_fan_out=True)),
    "adalora": ("llama", "adalora", dict(init_r=5, target_r=3, lora_alpha=7, total_step=9, target_modules=["q_proj", "down_proj"])),
    "adalora gpt2": ("gpt2", "adalora", dict(init_r=2, lora_alpha=0, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True)),
    "kasa": ("llama", "kasa", dict(kasa_config=peft.KasaConfig(beta=2e-4), r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"],
                                   rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 4})),
    "kasa rslora": ("bert", "kasa", dict(kasa_config=peft.KasaConfig(), use_rslora=True, r=3, target_modules=["query", "output.dense"])),
    "prompt": ("llama", "prompt", dict(num_virtual_tokens=3)),
    "prompt gpt2": ("gpt2", "prompt", dict(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")),
    "prefix": ("llama", "prefix", dict(num_virtual_tokens=3)),
    "prefix gpt2": ("gpt2", "prefix", dict(num_virtual_tokens=3)),
    "prefix of a network": ("qwen3", "prefix", dict(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)),
}


def written_by_peft(kind, method, folder, seed=1, **options):
    """(logits, model) of a PEFT model with random values, which is saved."""
    options = {"task_type": "CAUSAL_LM", **options} if method in PROMPTS else options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.ALL[kind](), CONFIGS[method](**options)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in (p for p in theirs.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        theirs.save_pretrained(folder)
    with torch.no_grad():
        return of_text(theirs), theirs


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
    extra = {"dora": {"use_dora": True}, "ia3": {"feedforward_modules": []}, "bat": {"init_weights": "bat"}, "adalora": {"total_step": 9},
             "kasa": {"kasa_config": peft.KasaConfig()}}.get(method, {})
    extra = {"num_virtual_tokens": 2} if method in PROMPTS else {"target_modules": ["q_proj"], **extra}
    written_by_peft("llama", method, tmp_path / "x", **extra)
    theirs = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    own = {"target_modules", "auto_mapping", "base_model_name_or_path", "feedforward_modules", "total_step", "num_virtual_tokens",
           "num_layers", "num_attention_heads", "token_dim", "encoder_hidden_size", *(["task_type"] if method in PROMPTS else [])}
    assert set(EXCHANGES[method].template) == set(theirs) - {"runtime_config"}
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


REFUSED = [
    ("lora", {"alora_invocation_tokens": [5]}, "alora_invocation_tokens"), ("lora", {"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ("lora", {"monteclora_config": {"num_samples": 4}}, "monteclora_config"), ("lora", {"velora_config": {"rank": 4}}, "velora_config"),
    ("lora", {"arrow_config": {"top_k": 3}}, "arrow_config"), ("lora", {"use_qalora": True}, "use_qalora"),
    ("lora", {"layer_replication": [[0, 2]]}, "layer_replication"), ("lora", {"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
    ("dora", {"kasa_config": {"beta": 0.1}}, "kasa_config="), ("kasa", {"lora_bias": True}, "lora_bias=True with 'kasa'"),
    ("adalora", {"bias": "lora_only"}, "bias='lora_only' with 'adalora'"), ("miss", {"bias": "MiSS_only"}, "bias='MiSS_only'"),
    ("bat", {"bias": "MiSS_only"}, "bias='MiSS_only' with 'bat'"), ("vera", {"bias": "vera_only"}, "bias='vera_only'"),
    ("randlora", {"save_projection": False}, "save_projection=False with 'randlora'"),
    ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules=2"), ("prompt", {"num_virtual_tokens": "many"}, "damaged"),
    ("prefix", {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
]


@pytest.mark.parametrize("method, change, words", REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_options_that_compute_something_else_are_refused_by_name(method, change, words, tmp_path):
    needed = {"num_virtual_tokens": 3} if method in PROMPTS else {"target_modules": ["q_proj"]}
    document = {**EXCHANGES[method].template, **needed, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=words) as caught:
        graftwork.attach_saved(tiny.llama(), tmp_path)
    assert caught.value.remedy


def test_every_other_type_of_peft_is_refused_by_name(tmp_path):
    known = {exchange.template["peft_type"] for exchange in EXCHANGES.values()}
    others = sorted({kind.value for kind in peft.PeftType} - known)
    assert {"BOFT", "HRA", "VBLORA", "FOURIERFT"} < set(others)
    for kind in others:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": ["q_proj"]}))
        with pytest.raises(ArtifactError, match=f"is a PEFT {kind} adapter; ADALORA, IA3") as caught:
            read_config(tmp_path)
        assert caught.value.remedy


@pytest.mark.parametrize("method, options", [("miss", {}), ("bat", {}), ("vera", {}), ("randlora", {"save_projection": True}),
                                             ("adalora", {}), ("kasa", {})])
@torch.no_grad()
def test_the_weight_of_a_graft_is_in_the_file(method, options, tmp_path):
    model = tiny.llama()
    graft = attach(model, method, target_modules=["q_proj", "down_proj"], **options)
    full = output(model, IDS)
    graft.scale(0.5)
    wanted = output(model, IDS)
    write_peft(graft, tmp_path / "x")
    document = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert document["peft_type"] == EXCHANGES[method].template["peft_type"]
    assert method != "kasa" or document["kasa_config"] is None  # a part of the tail: only a plain LoRA can say that
    assert (full - wanted).abs().max() > 1e-2
    close(output(through_peft(tiny.llama(), tmp_path / "x"), IDS), wanted, 1e-5)


@torch.no_grad()
def test_pruned_ranks_of_adalora(tmp_path):
    """PEFT's pattern of the ranks that stayed, one site without any: read, and written again."""
    options = dict(init_r=4, lora_alpha=3, total_step=9, target_modules=["q_proj", "v_proj"])
    _, theirs = written_by_peft("llama", "adalora", tmp_path / "whole", **options)
    stayed = {"model.layers.0.self_attn.q_proj": [True, False, True, False], "model.layers.0.self_attn.v_proj": [False] * 4,
              "model.layers.1.self_attn.q_proj": [False, True, False, False], "model.layers.1.self_attn.v_proj": [True] * 4}
    for name, mask in stayed.items():
        theirs.base_model.model.get_submodule(name).lora_E["default"].mul_(torch.tensor(mask).unsqueeze(1))
    theirs.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in stayed.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty tensors
        theirs.save_pretrained(tmp_path / "x")
    wanted = output(theirs, IDS)
    model = tiny.llama()
    graft = graftwork.attach_saved(model, tmp_path / "x")
    close(output(model, IDS), wanted, 1e-5)
    assert [a.gate.shape[0] for a in graft.adapters.values()] == [2, 1, 1, 4]
    graft.save(tmp_path / "ours")
    twin = tiny.llama()
    graftwork.attach_saved(twin, tmp_path / "ours")
    close(output(twin, IDS), wanted, 1e-5)
    write_peft(graft, tmp_path / "again")
    pattern = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rank_pattern"]
    assert {name.removesuffix(".lora_E"): sum(mask) for name, mask in pattern.items()} == {
        name: max(sum(mask), 1) for name, mask in stayed.items() if not all(mask)}
    close(output(through_peft(tiny.llama(), tmp_path / "again"), IDS), wanted, 1e-5)


@torch.no_grad()
def test_padding_around_virtual_tokens(tmp_path):
    """Padding on the right, with a mask: PEFT's logits at the text."""
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    for method in PROMPTS:
        _, theirs = written_by_peft("llama", method, tmp_path / method, num_virtual_tokens=3)
        model = tiny.llama()
        graftwork.attach_saved(model, tmp_path / method)
        got, wanted = output(model, IDS, attention_mask=mask), output(theirs, IDS, attention_mask=mask)[:, -7:]
        close(got[0], wanted[0], 1e-5)
        close(got[1, :5], wanted[1, :5], 1e-5)


def test_virtual_tokens_where_they_do_not_fit(tmp_path):
    written_by_peft("llama", "prefix", tmp_path / "x", num_virtual_tokens=3)
    with pytest.raises(ArtifactError, match=r"prompt_embeddings is \(3, 128\), expected \(3, 256\)"):
        graftwork.attach_saved(tiny.gpt2(), tmp_path / "x")
    with pytest.raises(IncompatibleError, match="no causal decoder"):
        graftwork.attach_saved(tiny.bert(), tmp_path / "x")
    graft = attach(tiny.qwen3(), "prompt", modules_to_save=["lm_head"])
    with pytest.raises(IncompatibleError, match="lm_head"):
        write_peft(graft, tmp_path / "y")
    with pytest.raises(IncompatibleError, match="no change of weights"):
        write_peft(attach(tiny.llama(), "prompt"), tmp_path / "y", style="baked")
    assert not (tmp_path / "y").exists()


@pytest.mark.slow
@torch.no_grad()
def test_the_pair_of_the_file_is_the_pair_that_computes(tmp_path):
    """A pair that no seed gives, and one larger than the sites need (a second adapter of a PEFT model takes the first one's)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.llama(), peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"])).eval()
        theirs.base_model.vera_A["default"].mul_(torch.linspace(-1.0, 2.0, tiny.FFN))
        theirs.add_adapter("small", peft.VeraConfig(r=6, target_modules=["k_proj"]))
        theirs.set_adapter("small")
        for name, p in theirs.named_parameters():
            if "vera_lambda" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        small = output(theirs, IDS)
        theirs.set_adapter("default")
        large = output(theirs, IDS)
        theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "small" / "adapter_model.safetensors")["base_model.vera_A"].shape == (6, tiny.FFN)
    for folder, wanted in ((tmp_path, large), (tmp_path / "small", small)):
        model = tiny.llama()
        graft = graftwork.attach_saved(model, folder)
        close(output(model, IDS), wanted, 1e-5)
        graft.save(tmp_path / f"ours-{folder.name}")
        write_peft(graft, tmp_path / f"peft-{folder.name}")
        model = tiny.llama()
        graftwork.attach_saved(model, tmp_path / f"ours-{folder.name}")
        close(output(model, IDS), wanted, 1e-5)
        close(output(through_peft(tiny.llama(), tmp_path / f"peft-{folder.name}"), IDS), wanted, 1e-5)


@torch.no_grad()
def test_what_peft_cannot_say_becomes_a_lora_or_is_refused(tmp_path):
    cases = {"miss": dict(rank_pattern={"v_proj": 3}), "kasa": dict(truncate=False),
             "vera": dict(ranks={"model.layers.0.self_attn.q_proj": 2})}
    for method, options in cases.items():
        model = tiny.llama()
        graft = attach(model, method, target_modules=["q_proj", "v_proj"], **options)
        assert write_peft(graft, tmp_path / method)["error"] == 0.0
        assert json.loads((tmp_path / method / "adapter_config.json").read_text())["kasa_config"] is None
        close(output(through_peft(tiny.llama(), tmp_path / method), IDS), output(model, IDS), 1e-5)
    with pytest.raises(IncompatibleError, match=r"one r of 'bat'; this graft has \[4, 8\]"):
        write_peft(attach(tiny.llama(), "bat", rank_pattern={"v_proj": 4}), tmp_path / "bat")
    with pytest.raises(IncompatibleError, match="one pair") as caught:
        write_peft(attach(tiny.llama(), "randlora"), tmp_path / "randlora")
    assert "save_projection" in caught.value.remedy


@pytest.mark.slow
@pytest.mark.parametrize("method", ["miss", "prompt"])
def test_convert_from_the_command_line(method, tmp_path, capsys):
    from graftwork.cli import main
    from graftwork.modeling.models import load_model

    tiny.save(tiny.llama(), tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    attach(model, method).save(tmp_path / "run" / "graft")
    main.app.registered_commands.clear()
    try:
        main.main(["convert", str(tmp_path / "run"), "--to", "peft", "-o", str(tmp_path / "peft"), "--json"])
    except SystemExit as leave:
        assert not leave.code, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["error"] == 0.0 and "adapter_model.safetensors" in result["files"]
    with torch.no_grad():
        close(of_text(through_peft(tiny.llama(), tmp_path / "peft")), output(model, IDS), 1e-5)


def test_a_copy_of_the_basis_that_differs_is_found(tmp_path):
    from safetensors.torch import save_file

    written_by_peft("llama", "randlora", tmp_path, r=10, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [key for key in tensors if key.endswith("q_proj.randlora_B")]
    assert len(copies) == tiny.LAYERS
    tensors[copies[0]][0, 0, 0] += 1.0
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="randlora_B is not the base_model.randlora_B that all sites share"):
        graftwork.attach_saved(tiny.llama(), tmp_path)


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


@pytest.mark.slow
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
