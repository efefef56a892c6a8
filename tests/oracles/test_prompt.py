"""Prompt tuning against PEFT's, the embeddings put before the text by hand, rows alone, and decoding without a cache."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

import graftwork
import tiny
from adapter_support import attach, close, fill
from graftwork.errors import UsageError
from graftwork.modeling.state import state_of
from graftwork.serving.generate import generate
from training_support import completions, folder, log_of, recipe, run

M, D = 3, tiny.HIDDEN


def prompt(model, name="a", seed=0, size=0.1, **options):
    return fill(attach(model, "prompt", name=name, seed=seed, filled=False, **options), seed + 1, size)


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@torch.no_grad()
def test_peft_has_equal_logits(kind):
    from peft import PromptTuningConfig, get_peft_model

    model = tiny.CAUSAL[kind]()
    adapter = prompt(model).adapters["prefix"]
    peft = get_peft_model(tiny.CAUSAL[kind](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=M))
    peft.prompt_encoder["default"].embedding.weight.copy_(adapter.prompt)
    ids, mask = tiny.tokens(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    close(model(ids).logits, peft(ids).logits[:, M:], 1e-6)
    got, wanted = model(ids, attention_mask=mask).logits, peft(ids, attention_mask=mask).logits[:, M:]
    close(got[0], wanted[0], 1e-6), close(got[1, :4], wanted[1, :4], 1e-6)


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@torch.no_grad()
def test_a_mask_without_padding_is_none(kind):
    model, ids = tiny.CAUSAL[kind](), tiny.tokens(2, 6)
    prompt(model)
    ones, heard = torch.ones_like(ids), []
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    body.forward = lambda *args, _forward=body.forward, **kwargs: heard.append(kwargs) or _forward(*args, **kwargs)
    got = model(ids, attention_mask=ones).logits
    assert heard[0]["attention_mask"] is None and heard[0]["position_ids"] is None
    assert torch.equal(got, model(ids).logits)
    ones[1, 4:] = 0
    model(ids, attention_mask=ones)
    assert heard[-1]["attention_mask"].shape == (2, 6 + M)


def test_gradients_in_float64():
    model, plain = tiny.llama(), tiny.llama().double()
    adapter = prompt(model).adapters["prefix"]
    ids = tiny.tokens(2, 5)
    model(ids).logits.square().sum().backward()
    Z = adapter.prompt.detach().double().requires_grad_()
    inputs = torch.cat([Z.expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    plain(inputs_embeds=inputs).logits[:, M:].square().sum().backward()
    close(adapter.prompt.grad, Z.grad, 1e-4)


@pytest.mark.parametrize("m", [1, 7])
@torch.no_grad()
def test_start_and_count(m):
    model = tiny.llama()
    model.graft_tokenizer = tiny.tokenizer()
    table = model.get_input_embeddings().weight
    values = {}
    for init in ("vocab", "random", "text"):
        text = {"init_text": "the best"} if init == "text" else {}
        graft = graftwork.attach(model, "prompt", name=init, num_virtual_tokens=m, init=init, **text)
        assert graft.parameter_count() == m * D
        values[init] = graft.adapters["prefix"].prompt.detach()
    assert (values["vocab"][:, None] == table[None]).all(-1).any(1).all()
    ids = (model.graft_tokenizer("the best")["input_ids"] * 7)[:m]
    assert torch.equal(values["text"], table[ids])
    assert values["random"].abs().max() <= 0.5 and values["random"].std() > 0.2
    assert not torch.equal(graftwork.attach(model, "prompt", name="b", seed=1, num_virtual_tokens=m).parameters()[0], values["vocab"])


@torch.no_grad()
def test_rows_padding_and_cache():
    model = tiny.llama()
    prompt(model), prompt(model, "b", 5, num_virtual_tokens=5)
    attach(model, "lora", name="l", seed=9), attach(model, "lopa", name="p", seed=8, num_virtual_tokens=2, r=2)
    names, ids = ["b", None, "a", "l", "p"], tiny.tokens(5, 6)
    mask = torch.ones_like(ids)
    mask[2, :2] = mask[4, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = tiny.tokens(5, 2, 8)
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


@torch.no_grad()
def test_cached_generation_is_uncached():
    model, rows, new = tiny.gpt2(), [tiny.tokens(1, n, n)[0].tolist() for n in (6, 3)], 5
    model.generation_config.eos_token_id = None
    prompt(model)
    found = generate(model, tiny.tokenizer(), rows, max_new_tokens=new)
    for completion, row in zip(found, rows, strict=True):
        ids = list(row)
        for _ in completion.ids:
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert list(completion.ids) == ids[len(row):] and completion.ids


@pytest.mark.parametrize("options", [{"init": "vocab"}, {"init": "random"}])
def test_it_learns(options):
    model, ids = tiny.llama(), tiny.tokens(4, 8)
    graft = prompt(model, size=0.0, **options)
    model.train()
    optimizer, losses = torch.optim.Adam(graft.parameters(), lr=5e-2), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses


def test_it_never_reads_the_prompt():
    """No warning for missing labels, and labels do not change the answer."""
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    prompt(model)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model(ids).logits
    assert torch.equal(model(ids, labels=torch.full_like(ids, -100)).logits, plain)


def test_loading_needs_no_tokenizer(tmp_path):
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    model.graft_tokenizer = tiny.tokenizer()
    graft = prompt(model, init="text", init_text="one and all")
    graft.save(tmp_path / "saved")
    again = tiny.llama()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(UsageError, match="tokenizer"):
        graftwork.attach(tiny.llama(), "prompt", init="text", init_text="one")


@pytest.mark.parametrize("options", [{"init": "text"}, {"init_text": "one"}, {"num_virtual_tokens": 0}, {"init": "words"}])
def test_wrong_options(options):
    with pytest.raises(UsageError):
        graftwork.attach(tiny.llama(), "prompt", **options)


@pytest.mark.slow
def test_a_recipe_is_planned_and_trained(tmp_path):
    model, file = folder(tmp_path), completions(tmp_path / "train.jsonl")
    adapter = {"method": "prompt", "num_virtual_tokens": 4, "init": "text", "init_text": "the end"}
    document = recipe(model, file, tmp_path / "out", adapter=adapter, train={"max_steps": 5})
    planned = graftwork.plan(document, estimate_time=False)
    assert planned.trained == 4 * D
    run(document)
    assert all(0 < row["loss"] < 20 for row in log_of(tmp_path / "out") if "loss" in row)
    card = json.loads((tmp_path / "out" / "graft" / "graft.json").read_text())
    assert card["method"] == "prompt" and card["parameters"] == planned.trained
