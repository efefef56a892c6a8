"""MixLoRA against a float64 loop over tokens and experts, a plain LoRA, merged weights, and Transformers' own load-balancing loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters.block_scope import feed_forward_nets
from graftwork.adapters.mixlora import MixLoRAAdapter
from graftwork.adapters.slot import Slot
from graftwork.artifact import attach_saved
from graftwork.data.collate import Collator
from graftwork.errors import IncompatibleError, UsageError
from graftwork.estimators.base import StepContext, micro_forward
from graftwork.modeling.state import state_of
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.planning.simulate import count_parameters, plan
from graftwork.recipe import load_recipe
from graftwork.serving.generate import generate
from training_support import completions, folder, log_of, recipe, run

pytestmark = pytest.mark.slow

IDS = tiny.tokens(2, 7)
OPTIONS = {"num_experts": 4, "top_k": 2, "r": 3, "alpha": 6.0, "dropout": 0.0}


def mixlora(model, name="a", seed=0, size=0.1, **options):
    return fill(graftwork.attach(model, "mixlora", name=name, seed=seed, **{**OPTIONS, **options}), seed + 1, size)


def nets(graft):
    return {name: a for name, a in graft.adapters.items() if isinstance(a, MixLoRAAdapter)}


def qwen_moe(**more):
    from transformers import Qwen2MoeConfig

    sizes = tiny._shape(num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
                        shared_expert_intermediate_size=32, initializer_range=0.1, **tiny.SPECIAL)
    return tiny._build("AutoModelForCausalLM", Qwen2MoeConfig(**{**sizes, **more}), 0)


def aux_of(graft):
    (found,) = [t for a in graft.adapters.values() if (t := a.auxiliary_loss()) is not None]
    return found


# -- the equations ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def loop(x, adapter, act, k):
    """One token and one expert at a time, in float64: x (T, d) -> (T, d)."""
    maps = {role: (site.product.dense().double(), None if site.product.bias is None else site.product.bias.double())
            for role, site in adapter.net.maps.items()}
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, h in enumerate(x.double()):
        p = torch.softmax(adapter.router.double() @ h, 0)
        best = p.argsort(descending=True)[:k].tolist()
        for e in best:
            def run(role, z, e=e):
                W, b = maps[role]
                pair = adapter.experts[role]
                y = (W + adapter.scale * pair.B[e].double() @ pair.A[e].double()) @ z
                return y if b is None else y + b

            if "gate" in maps:
                hidden = act(run("gate", h)) * run("up", h)
            elif "gate_up" in maps:
                gate, up = run("gate_up", h).chunk(2)
                hidden = act(gate) * up
            else:
                hidden = act(run("fc1", h))
            out[t] += p[e] / p[best].sum() * run("down" if "down" in maps else "fc2", hidden)
    return out


def with_nets(graft):
    """The adapters of the graft's nets, each with its net beside it."""
    for net in feed_forward_nets(graft.model):
        object.__setattr__(graft.adapters[net.name], "net", net)
    return nets(graft)


PLACES = {"llama": ("model.layers.1.mlp", "model.layers.1.mlp", "model.layers.1.mlp.ffn", "silu"),
          "qwen3": ("model.layers.1.mlp", "model.layers.1.mlp", "model.layers.1.mlp.ffn", "silu"),
          "gpt2": ("transformer.h.1.mlp", "transformer.h.1.mlp", "transformer.h.1.mlp.ffn", "gelu_new"),
          "bert": ("encoder.layer.1.intermediate", "encoder.layer.1.output.dense", "encoder.layer.1.ffn", "gelu")}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", PLACES)
@torch.no_grad()
def test_a_net_is_the_loop_over_experts(kind, k):
    model = tiny.ALL[kind]()
    graft = mixlora(model, top_k=k, use_rslora=k == 2, router_std=1.0)
    into, out, name, act = PLACES[kind]
    seen = {}
    model.get_submodule(into).register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    model.get_submodule(out).register_forward_hook(lambda m, args, y: seen.update(y=y))
    output(model, IDS)
    adapter = with_nets(graft)[name]
    assert adapter.scale == (6.0 / 3**0.5 if k == 2 else 2.0)
    assert seen["y"].shape == seen["x"].shape
    close(seen["y"].reshape(-1, tiny.HIDDEN), loop(seen["x"].reshape(-1, tiny.HIDDEN), adapter, ACT2FN[act], k), 1e-5)


@torch.no_grad()
def test_each_expert_of_a_mixture_is_a_net():
    """The model's router stays; each of its experts has a router and LoRA experts of its own."""
    model = tiny.mixtral()
    graft = mixlora(model, router_std=1.0)
    assert len(nets(graft)) == tiny.LAYERS * 4 and "model.layers.1.mlp.experts.3.ffn" in nets(graft)
    experts, seen = model.model.layers[1].mlp.experts, {}
    experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    experts.register_forward_hook(lambda m, args, y: seen.update(y=y))
    output(model, IDS)
    x, index, weights = seen["args"]
    wanted = torch.zeros_like(x, dtype=torch.float64)
    for e in range(4):
        share = (weights.double() * (index == e)).sum(-1, keepdim=True)
        wanted += share * loop(x, with_nets(graft)[f"model.layers.1.mlp.experts.{e}.ffn"], ACT2FN["silu"], 2)
    close(seen["y"], wanted, 1e-5)


@torch.no_grad()
def test_a_mixture_with_a_shared_expert():
    model = qwen_moe()
    before = output(model, IDS)
    graft = mixlora(model, size=0.0)
    assert {n.split(".", 4)[-1] for n in nets(graft)} == {"experts.0.ffn", "experts.1.ffn", "experts.2.ffn", "shared_expert.ffn"}
    close(output(model, IDS), before, 1e-5)
    fill(graft)
    assert (output(model, IDS) - before).abs().max() > 1e-2
    graft.detach()
    close(output(model, IDS), before, 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_expert_is_a_plain_lora(dropout):
    models = [tiny.llama(), tiny.llama()]
    ours = mixlora(models[0], num_experts=1, top_k=1, dropout=dropout)
    plain = graftwork.attach(models[1], "lora", name="a", r=3, alpha=6.0, dropout=dropout)
    pairs = {}
    for adapter in with_nets(ours).values():
        pairs.update({adapter.net.maps[role].name: adapter.experts[role] for role in adapter.net.maps})
    with torch.no_grad():
        for name, adapter in plain.adapters.items():
            own = pairs.get(name)
            adapter.lora_A.copy_(ours.adapters[name].lora_A if own is None else own.A[0])
            adapter.lora_B.copy_(ours.adapters[name].lora_B if own is None else own.B[0])
    for model in models:
        model.train()
        with state_of(model).scope(step=2):
            output(model, IDS).square().mean().backward()
    close(output(models[0].eval(), IDS), output(models[1].eval(), IDS), 1e-5)
    for name, adapter in plain.adapters.items():
        if name in pairs:
            close(pairs[name].A.grad[0], adapter.lora_A.grad, 1e-4), close(pairs[name].B.grad[0], adapter.lora_B.grad, 1e-4)
        else:
            close(ours.adapters[name].lora_B.grad, adapter.lora_B.grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.ALL)
@torch.no_grad()
def test_without_changes_routing_does_not_matter(kind, dtype):
    model = tiny.ALL[kind](dtype=dtype)
    before = output(model, IDS)
    graft = mixlora(model, size=0.0, router_std=3.0)
    close(output(model, IDS), before, 1e-5 if dtype == torch.float32 else 2e-2)
    assert {a.router.std().round().item() for a in nets(graft).values()} == {3.0}


@torch.no_grad()
def test_frozen_maps_are_multiplied_once(monkeypatch):
    """gate and up: each token once; down: each of its k copies once."""
    rows = {}
    plain = Slot.plain

    def counted(slot, x):
        rows.setdefault(slot.frozen.module, []).append(x.numel() // x.shape[-1])
        return plain(slot, x)

    monkeypatch.setattr(Slot, "plain", counted)
    model = tiny.llama()
    mixlora(model, top_k=3), mixlora(model, "b", 2)
    mlp = model.model.layers[0].mlp
    for names, down in ((["a", "a"], 42), (["b", "a"], 14 + 21), ([None, "b"], 7 + 14), ([None, None], 14)):
        rows.clear()
        with graftwork.routing(model, names):
            output(model, IDS)
        assert [rows[m] for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [[14], [14], [down]]


@torch.no_grad()
def test_experts_stand_on_the_other_grafts_of_a_map():
    """LoRA and MixLoRA on every row: the experts' base is W + the LoRA's change."""
    model, by_hand = tiny.llama(), tiny.llama()
    mixlora(model, attention=False)
    lora = attach(model, "lora", name="l", seed=5)
    for name, change in lora.delta_weights().items():
        by_hand.get_submodule(name).weight += change
    mixlora(by_hand, attention=False)
    close(output(model, IDS), output(by_hand, IDS), 1e-5)


@torch.no_grad()
def test_grafts_of_other_sizes_in_one_batch():
    model = tiny.llama()
    options = {"a": {}, "b": {"num_experts": 7, "top_k": 3, "r": 1}, "c": {"num_experts": 1, "top_k": 1, "attention": False}}
    for seed, (name, more) in enumerate(options.items()):
        mixlora(model, name, seed, **more)
    names = ["c", "a", None, "b", "a"]
    ids = tiny.tokens(5, 6)
    with graftwork.routing(model, names):
        mixed = output(model, ids)
        assert torch.equal(output(model, ids), mixed)
    for i, name in enumerate(names):
        with graftwork.routing(model, [name]):
            close(mixed[i], output(model, ids[i:i + 1])[0], 1e-5)


# -- the auxiliary loss -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("experts, k", [(8, 2), (6, 1), (5, 5)])
@torch.no_grad()
def test_loss_of_uniform_and_of_collapsed_routing(experts, k):
    model = tiny.llama()
    graft = mixlora(model, num_experts=experts, top_k=k, aux_coefficient=1.0).adapters["model.layers.0.mlp.ffn"]
    graft.train()
    x = torch.rand(40, tiny.HIDDEN) + 0.1
    graft.router.zero_()
    graft.route(x, state_of(model), lambda: None)
    close(graft.auxiliary_loss(), torch.tensor(float(k)), 1e-6)
    graft.router[2] = 50.0
    graft.route(x, state_of(model), lambda: None)
    close(graft.auxiliary_loss(), torch.tensor(float(experts)), 1e-5)
    assert graft.load[2] == pytest.approx(1 / k)
    assert graft.auxiliary_loss() is None, "once a forward"


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_loss_and_gradient_are_those_of_transformers(side):
    model, ids = tiny.llama(), tiny.tokens(3, 8)
    graft = mixlora(model, aux_coefficient=0.7, router_std=1.0)
    mask = torch.ones_like(ids)
    if side:
        mask[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
        mask[2, slice(0, 6) if side == "left" else slice(2, 8)] = 0
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, tiny.HIDDEN)))
    model.train()
    model(ids, attention_mask=mask)
    ours = aux_of(graft)
    own = list(nets(graft).values())
    theirs = 0.7 * load_balancing_loss_func(tuple(F.linear(x, a.router) for x, a in zip(seen, own)), 4, 2, mask if side else None)
    close(ours, theirs, 1e-5)
    routers = [a.router for a in own]
    for got, wanted in zip(torch.autograd.grad(ours, routers, retain_graph=True), torch.autograd.grad(theirs, routers)):
        close(got, wanted, 1e-4)
    for x, adapter in zip(seen, own):
        chosen = F.linear(x, adapter.router).topk(2).indices[mask.flatten() > 0]
        close(adapter.load, torch.bincount(chosen.flatten(), minlength=4) / chosen.numel(), 1e-6)
    model.eval()
    model(ids, attention_mask=mask)
    assert all(a.auxiliary_loss() is None for a in graft.adapters.values()), "only in training"


def test_padding_inside_a_mixture_and_of_packed_rows():
    ids = tiny.tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, :4] = 0, 0
    for model, copies in ((tiny.mixtral(), 2), (qwen_moe(), 3)):
        graft = mixlora(model, aux_coefficient=1.0)
        model.train()
        model(ids, attention_mask=mask)
        balance = next(iter(nets(graft).values())).balance
        assert balance.sums[2].item() == tiny.LAYERS * copies * int(mask.sum())
        model(ids)
        assert balance.sums[2].item() == tiny.LAYERS * copies * ids.numel(), "a forward starts anew"
    model = tiny.llama()
    graft = mixlora(model)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]},
            {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 1]}]
    batch = Collator(0)(rows)
    model.train()
    holder = state_of(model)
    context = StepContext(model, CausalLMObjective(), list(graft.named_parameters()), [batch], [1.0], holder, 0, 0)
    with micro_forward(context, 0):
        assert next(iter(nets(graft).values())).balance.sums[2].item() == tiny.LAYERS * 7


def test_rows_count_for_their_own_graft():
    model, ids = tiny.llama(), tiny.tokens(3, 8)
    grafts = {name: mixlora(model, name, seed, aux_coefficient=1.0) for seed, name in enumerate("abc")}
    mask = torch.ones_like(ids)
    mask[2, 3:] = 0
    model.train()
    with graftwork.routing(model, ["b", "a", "b"]):
        model(ids, attention_mask=mask)
    found = {n: next(iter(nets(g).values())).balance.sums for n, g in grafts.items()}
    assert found["c"] is None and [found[n][2].item() for n in "ab"] == [2 * 8, 2 * (8 + 3)]
    together = aux_of(grafts["a"])
    with graftwork.routing(model, ["a"]):
        model(ids[1:2])
    close(together, aux_of(grafts["a"]), 1e-5)


def test_the_router_starts_on_the_auxiliary_loss_alone():
    """While the experts are equal the task does not tell them apart; top_k 1 has no weights to learn from at all."""
    for options, size in (({}, 0.0), ({"top_k": 1}, 0.1)):
        model = tiny.llama()
        graft = mixlora(model, size=size, aux_coefficient=1.0, **options)
        model.train()
        routers = [a.router for a in nets(graft).values()]
        loss = output(model, IDS).square().mean()
        task = torch.autograd.grad(loss, routers, retain_graph=True, allow_unused=True)
        assert all(g is None or g.abs().max() < 1e-5 for g in task)
        assert all(g.abs().max() > 1e-4 for g in torch.autograd.grad(aux_of(graft), routers))


def test_a_prefix_leaves_the_padding_unknown():
    model = tiny.llama()
    graft = mixlora(model)
    prompt = attach(model, "prompt", name="p")
    output(model, IDS)
    model.train()
    with pytest.raises(IncompatibleError, match="padding is not known"):
        output(model, IDS)
    with graftwork.routing(model, ["a", "a"]):
        output(model, IDS)
    aux_of(graft), prompt.detach()
    output(model, IDS)
    aux_of(graft)


# -- options, counts, refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("kind, experts, r", [("llama", 4, 3), ("gpt2", 5, 2), ("mixtral", 2, 4), ("bert", 3, 1)])
def test_counts(kind, experts, r, attention, tmp_path):
    model = tiny.ALL[kind]()
    graft = graftwork.attach(model, "mixlora", num_experts=experts, r=r, attention=attention)
    d, f, kv = tiny.HIDDEN, tiny.FFN, tiny.HIDDEN * tiny.KV_HEADS // tiny.HEADS
    maps = {"llama": 3 * (d + f), "gpt2": 2 * (d + f), "bert": 2 * (d + f), "mixtral": d + 2 * f + f + d}[kind]
    beside = {"gpt2": (d + 3 * d) + 2 * d, "bert": 4 * 2 * d}.get(kind, 2 * 2 * d + 2 * (d + kv)) if attention else 0
    times = 4 if kind == "mixtral" else 1
    assert graft.parameter_count() == tiny.LAYERS * (times * experts * (r * maps + d) + r * beside)
    for net in feed_forward_nets(model):
        trained = sum(p.numel() for p in graft.adapters[net.name].parameters())
        assert trained == MixLoRAAdapter.parameter_count(net, graft.config)
    if kind == "llama":
        document = recipe(folder(tmp_path), completions(tmp_path / "t.jsonl"), tmp_path / "out",
                          adapter={"method": "mixlora", "num_experts": experts, "r": r, "attention": attention})
        assert count_parameters(load_recipe(document))[0] == graft.parameter_count()


@torch.no_grad()
def test_every_option_is_seen():
    def logits(size=0.1, **options):
        return output(*(lambda m: (mixlora(m, size=size, **options).model, IDS))(tiny.llama()))

    plain = logits()
    for change in ({"num_experts": 3}, {"top_k": 1}, {"r": 2}, {"alpha": 5.0}, {"alpha": None}, {"use_rslora": True},
                   {"router_std": 2.0}, {"attention": False}, {"layers_to_transform": [1]}):
        assert (logits(**change) - plain).abs().max() > 1e-4, change
    only = graftwork.attach(tiny.llama(), "mixlora", layers_to_transform=[1])
    assert {s.layer for s in only.sites.values()} == {1}
    head = graftwork.attach(tiny.bert_classifier(), "mixlora", modules_to_save=["classifier"])
    assert list(head.saved_modules) == ["classifier"]
    model = tiny.llama()
    graft = mixlora(model, aux_coefficient=0.0)
    model.train()
    output(model, IDS)
    assert all(a.auxiliary_loss() is None for a in graft.adapters.values())
    close(sum(a.load for a in nets(graft).values()).sum(), torch.tensor(2.0))


def test_refusals(tmp_path):
    from transformers import MambaConfig

    mamba = tiny._build("AutoModelForCausalLM", MambaConfig(
        vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4, expand=2, **tiny.SPECIAL), 0)
    before = [type(m) for m in mamba.modules()]
    with pytest.raises(UsageError, match="no feed-forward net.*\n*.*") as refused:
        graftwork.attach(mamba, "mixlora")
    assert "lora" in refused.value.remedy and [type(m) for m in mamba.modules()] == before and not state_of(mamba).grafts
    document = recipe(folder(tmp_path), completions(tmp_path / "t.jsonl"), tmp_path / "out",
                      adapter={"method": "mixlora", "layers_to_transform": [9]})
    for refusing in (plan, run):
        with pytest.raises(UsageError, match="no feed-forward net in layers 9"):
            refusing(document)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    with pytest.raises(UsageError, match="rank 65.*64 x 96|rank 65.*96 x 64"):
        graftwork.attach(tiny.llama(), "mixlora", r=65)
    with pytest.raises(UsageError, match="top_k 3 of 2"):
        graftwork.attach(tiny.llama(), "mixlora", num_experts=2, top_k=3)


# -- files, decoding, a run -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_saved_graft_answers_its_rows(kind, tmp_path):
    model, tokenizer, new = tiny.CAUSAL[kind](), tiny.tokenizer(), 5
    mixlora(model, seed=3).save(tmp_path / "a")
    served = tiny.CAUSAL[kind]()
    served.generation_config.eos_token_id = None
    attach_saved(served, tmp_path / "a", name="a")
    attach(served, "lora", name="l", seed=9)
    rows, names = [tiny.tokens(1, n, n)[0].tolist() for n in (6, 3, 4, 5)], ["a", None, "l", "a"]

    def uncached(row, name):
        ids = list(row)
        with graftwork.routing(served, [name]):
            for _ in range(new):
                ids.append(served(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        return ids[len(row):]

    for found, row, name in zip(generate(served, tokenizer, rows, adapters=names, max_new_tokens=new), rows, names):
        assert len(found.ids) and list(found.ids) == uncached(row, name)[:len(found.ids)]


def test_a_run_with_checkpointing_is_the_run_without(tmp_path):
    file, model = completions(tmp_path / "t.jsonl"), folder(tmp_path)
    options = {"method": "mixlora", **OPTIONS, "dropout": 0.1, "aux_coefficient": 0.5}
    logs = []
    for name, on, adapter in (("plain", False, options), ("again", True, options), ("less", False, {**options, "aux_coefficient": 0.0})):
        run(recipe(model, file, tmp_path / name, adapter=adapter, train={"gradient_checkpointing": on, "grad_accumulation": 2,
                                                                          "batch_size": 2}))
        logs.append([row["loss"] for row in log_of(tmp_path / name) if "loss" in row])
    assert logs[0] == logs[1] and len(logs[0]) == 6 and logs[0][0] == logs[2][0] and logs[0] != logs[2]
    assert logs[0][-1] < logs[0][0]


def test_a_copy_of_a_model_has_nets_of_its_own():
    model = tiny.llama()
    graft = mixlora(model)
    twin = copy.deepcopy(model)
    wanted = output(model, IDS)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.zero_()
    assert torch.equal(output(twin, IDS), wanted) and not torch.allclose(output(model, IDS), wanted)
