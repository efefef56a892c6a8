"""Prefix tuning against PEFT's (same values, equal logits), attention computed by hand, rows alone, caches, checkpointing."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import graftwork
import tiny
from adapter_support import attach, close, fill
from graftwork.errors import IncompatibleError, UsageError
from graftwork.modeling.state import state_of
from graftwork.serving.generate import generate
from training_support import completions, folder, log_of, recipe, run

M, L = 3, tiny.LAYERS
WIDTH = {"llama": 32, "gpt2": 64, "qwen3": 64, "mixtral": 32}  # key/value heads * head size


def prefix(model, name="a", seed=0, size=0.3, **options):
    return fill(attach(model, "prefix", name=name, seed=seed, filled=False, **options), seed + 1, size)


def with_cache(model, adapter, ids, mask=None):
    """Logits of a model whose cache was filled with the prefix by hand: an independent reference."""
    cache, n = DynamicCache(), ids.shape[0]
    for layer, (keys, values) in enumerate(adapter.keys_values()):
        heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        keys, values = (t.unflatten(-1, (heads, -1)).transpose(0, 1).expand(n, -1, -1, -1) for t in (keys, values))
        cache.update(keys.to(model.dtype), values.to(model.dtype), layer)
    mask = None if mask is None else F.pad(mask, (adapter.length, 0), value=1)
    return model(ids, attention_mask=mask, past_key_values=cache).logits


# -- oracles ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_peft_has_equal_logits(kind, network):
    from peft import PrefixTuningConfig, get_peft_model

    model, width = tiny.CAUSAL[kind](), WIDTH[kind]
    adapter = prefix(model, reparametrize=width if network else 0, init="random").adapters["prefix"]
    peft = get_peft_model(tiny.CAUSAL[kind](), PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=M, prefix_projection=network, encoder_hidden_size=width)).eval()
    encoder = peft.prompt_encoder["default"]
    if network:  # its rows are in the order (layer, keys or values), like ours
        encoder.embedding.weight.copy_(adapter.token)
        for theirs, (weight, bias) in zip(encoder.transform[::2], (("inner", "inner_bias"), ("outer", "outer_bias")), strict=True):
            theirs.weight.copy_(getattr(adapter, weight)), theirs.bias.copy_(getattr(adapter, bias))
    else:
        encoder.embedding.weight.copy_(adapter.kv.permute(2, 0, 1, 3).flatten(1))
    ids, mask = tiny.tokens(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    close(model(ids).logits, peft(ids).logits, 1e-5)
    got, wanted = model(ids, attention_mask=mask).logits, peft(ids, attention_mask=mask).logits
    close(got[0], wanted[0], 1e-5), close(got[1, :4], wanted[1, :4], 1e-5)


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_a_cache_filled_by_hand(kind):
    model, plain, ids = tiny.CAUSAL[kind](), tiny.CAUSAL[kind]().requires_grad_(False), tiny.tokens(2, 6)
    graft = prefix(model)
    adapter = graft.adapters["prefix"]
    got, wanted = model(ids).logits, with_cache(plain, adapter, ids)
    close(got, wanted, 1e-5)
    (mine,), (theirs,) = (torch.autograd.grad(y.square().sum(), adapter.kv) for y in (got, wanted))
    close(mine, theirs, 1e-4)
    with graft.disabled():
        assert (model(ids).logits - got).abs().max() > 1e-2


@torch.no_grad()
def test_attention_by_hand_in_float64():
    """One attention of GPT-2 with the prefix concatenated, from its own weights."""
    model = tiny.gpt2()
    adapter = prefix(model).adapters["prefix"]
    block, seen = model.transformer.h[0].attn, []
    handle = block.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    model(tiny.tokens(1, 5))
    handle.remove()
    (x, got), split = seen[0], lambda t: t.unflatten(-1, (tiny.HEADS, -1)).transpose(0, 1)
    q, k, v = (x[0].double() @ block.c_attn.weight.double() + block.c_attn.bias.double()).split(64, -1)
    K, V = adapter.kv[0].double()
    q, k, v = split(q[M:]), split(torch.cat([K, k[M:]])), split(torch.cat([V, v[M:]]))
    allowed = torch.ones(5, M + 5, dtype=torch.bool).tril(M)
    scores = (q @ k.transpose(1, 2) / 16**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    wanted = (scores @ v).transpose(0, 1).flatten(1) @ block.c_proj.weight.double() + block.c_proj.bias.double()
    close(got[0, M:], wanted, 1e-5)


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@torch.no_grad()
def test_the_start_is_a_text_of_random_tokens(kind):
    """init: vocab computes what the model itself would hold for m tokens."""
    model, ids = tiny.CAUSAL[kind](), tiny.tokens(1, 6)
    graft = prefix(model, size=0.0, seed=7)
    from graftwork.adapters.graft import site_generator

    generator = site_generator(7, "prefix")
    torch.randn(L, 2, M, WIDTH[kind], generator=generator)
    words = torch.randint(0, tiny.VOCAB, (1, M), generator=generator)
    with graft.disabled():
        wanted = model(torch.cat([words, ids], 1)).logits[:, M:]
    close(model(ids).logits, wanted, 1e-5)
    noise = prefix(tiny.CAUSAL[kind](), size=0.0, init="random").adapters["prefix"].kv
    assert 0.015 < noise.std() < 0.025


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_count(kind):
    total = 2 * L * WIDTH[kind]
    assert prefix(tiny.CAUSAL[kind](), num_virtual_tokens=5).parameter_count() == 5 * total
    graft = prefix(tiny.CAUSAL[kind](), num_virtual_tokens=5, reparametrize=9)
    adapter = graft.adapters["prefix"]
    assert graft.parameter_count() == 5 * 9 + 9 * 9 + 9 + total * 10 == type(adapter).parameter_count(adapter, graft.config)


# -- rows, padding, cache -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "sliding"])
@torch.no_grad()
def test_mixed_padded_rows_are_the_rows_alone(kind):
    if kind == "sliding":
        from transformers import MistralConfig

        sizes = tiny._shape(num_key_value_heads=2, sliding_window=5, initializer_range=0.1, **tiny.SPECIAL)
        model = tiny._build("AutoModelForCausalLM", MistralConfig(**sizes), 0)
    else:
        model = tiny.CAUSAL[kind]()
    prefix(model), prefix(model, "b", 5, num_virtual_tokens=5, reparametrize=8)
    attach(model, "lora", name="l", seed=9), attach(model, "prompt", name="p", seed=8, num_virtual_tokens=2)
    names, ids = ["b", None, "a", "l", "p", "a"], tiny.tokens(6, 6)
    mask = torch.ones_like(ids)
    mask[0, :1] = mask[2, :2] = mask[4, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = tiny.tokens(6, 2, 8)
    with graftwork.routing(model, names):
        filled = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        step = model(more, attention_mask=F.pad(mask, (0, 2), value=1), position_ids=positions[:, -1:] + torch.tensor([1, 2]),
                     past_key_values=filled.past_key_values, use_cache=True).logits
    for i, name in enumerate(names):
        row = ids[i:i + 1, mask[i] == 1]
        with state_of(model).scope(disabled=frozenset(state_of(model).grafts) - {name}):
            alone = model(row, use_cache=True)
            close(filled.logits[i, -row.shape[1]:], alone.logits[0], 2e-5)
            close(step[i], model(more[i:i + 1], past_key_values=alone.past_key_values, use_cache=True).logits[0], 2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_cached_generation_is_uncached(kind):
    model, rows, new = tiny.CAUSAL[kind](), [tiny.tokens(1, n, n)[0].tolist() for n in (6, 3, 4)], 5
    model.generation_config.eos_token_id = None
    graft = prefix(model)
    plain = tiny.CAUSAL[kind]()
    found = generate(model, tiny.tokenizer(), rows, adapters=["a", None, "a"], max_new_tokens=new)
    for completion, row, name in zip(found, rows, ["a", None, "a"], strict=True):
        ids = list(row)
        for _ in completion.ids:
            text = torch.tensor([ids])
            logits = with_cache(plain, graft.adapters["prefix"], text) if name else plain(text).logits
            ids.append(logits[0, -1].argmax().item())
        assert list(completion.ids) == ids[len(row):] and completion.ids


# -- training ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("own_context", [True, False])
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_checkpointed_gradients_are_equal(kind, own_context):
    """A repeated layer sees the prefix again, also where its cache was taken away; PEFT refuses this case."""
    model = tiny.CAUSAL[kind]()
    grafts = [prefix(model), prefix(model, "b", 3, num_virtual_tokens=2, reparametrize=6)]
    model.train()
    ids, state = tiny.tokens(3, 6), state_of(model)

    def gradients():
        model.zero_grad()
        with graftwork.routing(model, ["a", "b", None]):
            model(ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()
        return [p.grad.clone() for g in grafts for p in g.parameters()]

    plain = gradients()
    assert all(g.abs().sum() > 0 for g in plain)
    kwargs = state.checkpoint_kwargs() if own_context else {"use_reentrant": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert all(torch.equal(x, y) for x, y in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"reparametrize": 16}])
def test_it_learns(options):
    model, ids = tiny.llama(), tiny.tokens(4, 8)
    graft = prefix(model, size=0.0, **options)
    model.train()
    optimizer, losses = torch.optim.Adam(graft.parameters(), lr=5e-2), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"reparametrize": 6}, {"init": "random"}])
def test_a_step_on_fake_tensors(options):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = tiny.llama()
        graft = attach(model, "prefix", **options)
        ids = torch.ones(2, 7, dtype=torch.int64)
        model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        assert all(p.grad.shape == p.shape for p in graft.parameters())


def test_bf16():
    model, plain = (tiny.llama(dtype=torch.bfloat16) for _ in range(2))
    adapter, ids = prefix(model).adapters["prefix"], tiny.tokens(2, 6)
    got = model(ids).logits
    assert got.dtype == torch.bfloat16 and adapter.kv.dtype == torch.float32
    close(got, with_cache(plain, adapter, ids), 2e-2)
    got.float().square().sum().backward()
    assert adapter.kv.grad.any()


# -- files, recipes ---------------------------------------------------------------------------------------------------------
def test_the_network_is_not_saved_and_what_is_loaded_goes_on(tmp_path):
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    graft = prefix(model, reparametrize=6)
    graft.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "graft.json").read_text())
    assert card["tensors"] == {"prefix.kv": [[L, 2, M, WIDTH["llama"]], "float32"]}
    again = tiny.llama()
    loaded = graftwork.attach_saved(again, tmp_path / "saved", trainable=True)
    assert torch.equal(again(ids).logits, model(ids).logits) and loaded.config == graft.config
    (kv,) = loaded.parameters()
    before = kv.detach().clone()
    again(ids).logits.square().mean().backward()
    torch.optim.SGD([kv], lr=1.0).step()
    assert not torch.equal(kv, before)
    loaded.save(tmp_path / "more")
    last = tiny.llama()
    graftwork.attach_saved(last, tmp_path / "more")
    assert torch.equal(last(ids).logits, again(ids).logits)


@pytest.mark.parametrize("network", [0, 6])
@pytest.mark.slow
def test_a_recipe_is_planned_and_trained(tmp_path, network):
    model, file = folder(tmp_path), completions(tmp_path / "train.jsonl")
    adapter = {"method": "prefix", "num_virtual_tokens": 4, "reparametrize": network}
    document = recipe(model, file, tmp_path / "out", adapter=adapter, train={"max_steps": 5})
    planned = graftwork.plan(document, estimate_time=False)
    total = 2 * L * WIDTH["llama"]
    assert planned.trained == (4 * 6 + 36 + 6 + total * 7 if network else 4 * total)
    run(document)
    assert all(0 < row["loss"] < 20 for row in log_of(tmp_path / "out") if "loss" in row)
    card = json.loads((tmp_path / "out" / "graft" / "graft.json").read_text())
    assert card["method"] == "prefix" and card["parameters"] == planned.trained


# -- what is refused ----------------------------------------------------------------------------------------------------------
def test_refusals():
    model = tiny.llama()
    graft = prefix(model)
    for call in (graft.merge, graft.to_lora, lambda: graft.scale(0.5)):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(IncompatibleError, match="no causal decoder"):
        graftwork.attach(tiny.bert(), "prefix")
    with pytest.raises(UsageError):
        graftwork.attach(tiny.llama(), "prefix", init="text")
    graft.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_layer_that_misses_the_prefix_is_an_error():
    """Attention code that drops the call's keywords must not silently run without the prefix."""
    model = tiny.llama()
    prefix(model)
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda m, args, kwargs: (args, {k: v for k, v in kwargs.items() if "fill" not in k}),
                                    with_kwargs=True)
    with pytest.raises(IncompatibleError, match="1 of 2 layers"):
        model(tiny.tokens(1, 4))
