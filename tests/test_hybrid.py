"""Models with recurrent layers (Mamba, Mamba2, gated delta rule, RG-LRU): their linear maps take adapters like any other, and a
map that its block never calls takes none."""

import importlib

import pytest
import torch

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.errors import IncompatibleError, UsageError
from graftwork.modeling.calls import reads
from graftwork.modeling.sites import find_sites
from graftwork.serving.generate import generate
from training_support import completions, folder, recipe, run

pytestmark = pytest.mark.slow

SIZES = dict(vocab_size=tiny.VOCAB, hidden_size=64, initializer_range=0.1, **tiny.SPECIAL)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=8)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)


def mamba(**more):
    from transformers import MambaConfig
    return MambaConfig(**{**SIZES, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4, **more})


def mamba2(**more):
    from transformers import Mamba2Config
    return Mamba2Config(**{**SIZES, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8,
                           "num_hidden_layers": 2, **more})


def jamba():
    from transformers import JambaConfig
    return JambaConfig(**SIZES, **ATTENTION, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                       expert_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4)


def falcon_h1():
    from transformers import FalconH1Config
    return FalconH1Config(**SIZES, **ATTENTION, **MAMBA2, num_hidden_layers=2, mamba_d_ssm=128)


def granite():
    from transformers import GraniteMoeHybridConfig
    return GraniteMoeHybridConfig(**SIZES, **ATTENTION, **MAMBA2, num_hidden_layers=2, layer_types=["mamba", "attention"],
                                  num_local_experts=4, shared_intermediate_size=48, position_embedding_type="rope")


def qwen3_next():
    from transformers import Qwen3NextConfig
    return Qwen3NextConfig(**SIZES, **ATTENTION, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=16,
                           linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                           num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)


def recurrent_gemma():
    from transformers import RecurrentGemmaConfig
    return RecurrentGemmaConfig(**{**SIZES, **ATTENTION, "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 64,
                                   "attention_window_size": 32})


#: builder -> last names of the sites that all-linear finds (experts by their attribute), and of the group "recurrent"
ATTENTION_MAPS = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED, EXPERTS = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}
SITES = {
    mamba: ({"in_proj", "x_proj", "out_proj"}, {"in_proj", "x_proj", "out_proj"}),
    mamba2: ({"in_proj", "out_proj"}, {"in_proj", "out_proj"}),
    jamba: ({"in_proj", "x_proj", "out_proj"} | ATTENTION_MAPS | GATED | EXPERTS, {"in_proj", "x_proj", "out_proj"}),
    falcon_h1: ({"in_proj", "out_proj"} | ATTENTION_MAPS | GATED, {"in_proj", "out_proj"}),
    granite: ({"in_proj", "out_proj", "input_linear", "output_linear"} | ATTENTION_MAPS | EXPERTS, {"in_proj", "out_proj"}),
    qwen3_next: ({"in_proj_qkvz", "in_proj_ba", "out_proj"} | ATTENTION_MAPS | GATED | EXPERTS,
                 {"in_proj_qkvz", "in_proj_ba", "out_proj"}),
    recurrent_gemma: ({"linear_x", "linear_y", "linear_out"} | ATTENTION_MAPS | GATED, {"linear_x", "linear_y", "linear_out"}),
}
KINDS = {config.__name__: config for config in SITES}
CACHED = [name for name in KINDS if name != "recurrent_gemma"]
METHODS = ["lora", "paca", "nola", "flora"]


def build(kind, seed=0):
    return tiny._build("AutoModelForCausalLM", KINDS[kind](), seed)


def last_names(sites):
    return {s.attribute or s.name.rpartition(".")[2] for s in sites}


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_roles(kind):
    model = build(kind)
    everything, recurrent = SITES[KINDS[kind]]
    assert last_names(find_sites(model)) == everything
    assert last_names(find_sites(model, "recurrent")) == recurrent
    assert all(".self_attn." in s.name or "temporal_block" in s.name for s in find_sites(model, "attention")) \
        if everything & ATTENTION_MAPS else True
    assert all(s.layer >= 0 for s in find_sites(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_start_gradients_artifact_and_detach(kind, method, tmp_path):
    model, ids = build(kind), tiny.tokens(2, 24)
    state, classes = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    before = output(model, ids)
    graft = attach(model, method, filled=False)
    close(output(model, ids), before, 2e-6)
    fill(graft)
    assert (output(model, ids) - before).abs().max() > 1e-2
    model.train()
    output(model, ids, use_cache=False).square().sum().backward()
    dead = [name for name, p in graft.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.eval()
    learned = output(model, ids).detach()
    graft.save(tmp_path / "saved")
    graft.detach()
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)
    assert [type(m) for m in model.modules()] == classes and torch.equal(output(model, ids), before)
    graftwork.attach_saved(model, tmp_path / "saved")
    close(output(model, ids), learned, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_routed_rows_equal_row_by_row(kind):
    model, ids = build(kind), tiny.tokens(5, 9)
    for name, method in zip("abcd", METHODS):
        attach(model, method, name=name, seed=ord(name))
    rows = ["c", None, "a", "d", "b"]
    with graftwork.routing(model, rows):
        mixed = output(model, ids, use_cache=False)
    for i, row in enumerate(rows):
        with graftwork.routing(model, [row]):
            close(mixed[i : i + 1], output(model, ids[i : i + 1], use_cache=False), 1e-4)


PROMPTS = ["hello there", "x", "the user and one more of these", "th"]


@pytest.mark.parametrize("kind", CACHED)
def test_generate_with_a_cache_as_transformers_does(kind):
    model, tokenizer = build(kind), tiny.tokenizer()
    attach(model, "lora", name="a")
    attach(model, "paca", name="b", seed=3)
    names = ["a", None, "b", "a"]
    answers = generate(model, tokenizer, PROMPTS, adapters=names, max_new_tokens=6, batch_size=4, gaps=True)
    for prompt, name, answer in zip(PROMPTS, names, answers):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with graftwork.routing(model, [name]):
            alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:].tolist()
        for got, wanted, gap in zip(answer.ids, alone, answer.gaps):
            if gap < 1e-4:  # a tie may fall either way
                break
            assert got == wanted, (prompt, answer.ids, alone)


def test_rows_that_leave_take_their_state_along():
    """Rows end at different steps, so the batch shrinks while the others go on."""
    model, tokenizer = build("falcon_h1"), tiny.tokenizer()
    attach(model, "lora", name="a")
    long = generate(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=1)
    stops = [long[0].text[:1], long[1].text[:2], long[2].text[:1]]
    stops = [s for s in stops if s.strip()]
    alone = generate(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=1, stop=stops)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=5, stop=stops)
    assert len({a.tokens for a in alone}) > 1
    assert [a.ids for a in alone] == [t.ids for t in together]


def test_state_outside_the_cache_is_refused():
    model, tokenizer = build("recurrent_gemma"), tiny.tokenizer()
    with pytest.raises(IncompatibleError, match="keeps its state outside the cache"):
        generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
    attach(model, "lora", name="a")
    ids = torch.tensor([tokenizer("hello there")["input_ids"]])
    step_by_step = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(step_by_step, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


# -- maps that are not called --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_map_that_is_never_called_is_refused_by_name(kind):
    model = build(kind)
    with pytest.raises(UsageError, match="dt_proj' takes no adapter: its block reads the weight"):
        graftwork.attach(model, "lora", target_modules=["in_proj", "dt_proj"])
    assert not any(hasattr(m, "graft") for m in model.modules())


FUSED = {"mamba": ("mamba_inner_fn", "x_proj"), "mamba2": ("mamba2_split_conv1d_scan_combined", "out_proj"),
         "falcon_h1": ("mamba2_split_conv1d_scan_combined", "out_proj"), "granite": ("mamba2_split_conv1d_scan_combined", "out_proj")}


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_kernel_does_not_bypass_an_adapter(kind, monkeypatch):
    """With its kernels installed a block in training hands the weight of a map to one of them and calls the map no more."""
    model, ids, (kernel, target) = build(kind).train(), tiny.tokens(1, 8), FUSED[kind]
    mixer = next(m for m in model.modules() if kernel in reads_globals(m))
    calls = []
    monkeypatch.setitem(reads_globals(mixer), kernel, lambda *args, **kwargs: calls.append(kernel))
    plain = type(mixer)
    output(model, ids, use_cache=False)
    assert calls, "this Transformers has another fused path: find out which"
    before = len(calls)
    graft = attach(model, "lora", target_modules=[target])
    assert type(mixer) is not plain and mixer.training
    output(model, ids, use_cache=False).sum().backward()
    assert len(calls) == before and all(p.grad.abs().sum() > 0 for p in graft.parameters())
    assert mixer.training and all(m.training for m in mixer.modules())
    graft.detach()
    assert type(mixer) is plain
    output(model, ids, use_cache=False)
    assert len(calls) > before


def reads_globals(module):
    return vars(importlib.import_module(type(module).__module__)) if reads(module) else {}


def test_reads_of_weights_are_told_from_the_source():
    assert reads(next(m for m in build("mamba").modules() if type(m).__name__ == "MambaMixer")) == {
        "conv1d": "always", "x_proj": "training", "dt_proj": "always", "out_proj": "training"}
    assert reads(next(m for m in build("falcon_h1").modules() if type(m).__name__ == "FalconH1Mixer"))["out_proj"] == "training"
    assert all(reads(m).get("down_proj") is None for m in tiny.llama().modules())


def test_a_read_behind_a_switch_of_the_config_counts_when_it_is_on():
    from transformers import BloomConfig

    def bloom(**more):
        return tiny._build("AutoModelForCausalLM", BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=4, **more), 0)

    assert {"dense", "dense_4h_to_h"} <= last_names(find_sites(bloom()))
    sliced = find_sites(bloom(pretraining_tp=2, slow_but_exact=True))
    assert last_names(sliced) == {"query_key_value", "dense_h_to_4h"}


def test_a_site_that_no_gradient_reaches_is_named_after_the_first_step(tmp_path):
    """Where the source does not tell: the map is passed by at run time."""
    base, model = folder(tmp_path), tiny.llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) @ mlp.down_proj.weight.T
    with pytest.warns(UserWarning, match=r"no gradient reached 1 sites in the first step \(model.layers.1.mlp.down_proj\)"):
        run(recipe(base, completions(tmp_path / "d.jsonl"), tmp_path / "out", train={"max_steps": 2}), model=model,
            tokenizer=tiny.tokenizer())


# -- what else knows of layers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mamba", "jamba", "granite"])
def test_quantised_storage_leaves_what_is_not_called(kind):
    from graftwork.registry import make_config
    from graftwork.storage.base import Storage, apply_storage

    model, ids = build(kind), tiny.tokens(2, 8)
    before = output(model, ids)
    apply_storage(model, make_config("storage", "nf4"))
    stored = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Storage)}
    assert "in_proj" in stored and "dt_proj" not in stored
    graft = attach(model.train(), "lora")
    output(model, ids, use_cache=False).sum().backward()
    assert all(p.grad is not None for p in graft.parameters())
    graft.detach()
    close(output(model.eval(), ids), before, 0.5)


@pytest.mark.parametrize("kind, adapter", [("mamba", "prompt"), ("recurrent_gemma", "prompt"), ("jamba", "prefix")])
def test_virtual_tokens_are_refused_where_nothing_would_keep_them(kind, adapter):
    with pytest.raises(IncompatibleError, match="keeps its state in no key/value cache|keep keys and values of one width"):
        graftwork.attach(build(kind), adapter, num_virtual_tokens=3)


@torch.no_grad()
def test_a_prompt_before_a_hybrid_model():
    model, ids, pad = build("falcon_h1"), tiny.tokens(2, 7), torch.zeros(2, 3, dtype=torch.int64)
    attach(model, "prompt", name="a")
    alone = output(model, ids, use_cache=False)
    mask = torch.cat([pad, torch.ones_like(ids)], 1)
    close(output(model, torch.cat([pad, ids], 1), attention_mask=mask, use_cache=False)[:, 3:], alone, 1e-5)
    with graftwork.routing(model, ["a", None]):
        close(output(model, ids, use_cache=False)[:1], alone[:1], 1e-5)
    new = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(output(model, new[:, :-1], use_cache=False)[:, 6:].argmax(-1), new[:, 7:])


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_recipe_trains_and_plans_one(kind, tmp_path):
    tiny.save(build(kind), tmp_path / "model")
    document = recipe(tmp_path / "model", completions(tmp_path / "d.jsonl"), tmp_path / "out", train={"max_steps": 2})
    made = graftwork.plan(document, estimate_time=False)
    done = run(document)
    assert made.peak_bytes > 0 and done.steps == 2
    assert all(a.lora_B.any() for n, a in done.grafts[0].adapters.items() if done.grafts[0].sites[n].expert is None)


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
def test_packed_rows_are_refused(kind):
    from graftwork.data import assert_packable

    with pytest.raises(IncompatibleError, match="does not keep packed examples apart"):
        assert_packable(build(kind))
