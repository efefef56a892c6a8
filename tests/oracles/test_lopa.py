"""LoPA against PEFT's prompt tuning, a float64 reference, the rows of a batch alone, and decoding without a cache."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch
import torch.nn.functional as F

import graftwork
import tiny
from adapter_support import attach, close, fill
from graftwork.adapters.model_scope import prompt_mask
from graftwork.errors import ArtifactError, IncompatibleError, UsageError
from graftwork.modeling.state import state_of
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.serving.generate import generate
from training_support import completions, folder, log_of, recipe, run

M, D = 3, tiny.HIDDEN
OPTIONS = {"num_virtual_tokens": M, "r": 2}
ENCODERS = ["base", "embeddings"]


def lopa(model, name="a", seed=0, size=0.1, **options):
    return fill(attach(model, "lopa", name=name, seed=seed, filled=False, **{**OPTIONS, **options}), seed + 1, size)


def padded(rows, side="left"):
    """(ids, mask, positions) of rows of unequal length."""
    width = max(map(len, rows))
    gap = [[0] * (width - len(r)) for r in rows]
    both = [(g + r, [0] * len(g) + [1] * len(r)) if side == "left" else (r + g, [1] * len(r) + [0] * len(g))
            for g, r in zip(gap, rows)]
    ids, mask = (torch.tensor(part) for part in zip(*both))
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def prompts(*lengths, seed=3):
    return [tiny.tokens(1, n, seed + n)[0].tolist() for n in lengths]


@contextlib.contextmanager
def only(model, name):
    """Scope in which just this graft (None: none) answers."""
    with state_of(model).scope(disabled=frozenset(state_of(model).grafts) - {name}):
        yield


# -- oracles ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", tiny.CAUSAL)
@torch.no_grad()
def test_an_open_gate_is_prompt_tuning(kind):
    from peft import PromptTuningConfig, get_peft_model

    model = tiny.CAUSAL[kind]()
    adapter = lopa(model).adapters["prefix"]
    adapter.row_out.zero_(), adapter.column_out.zero_()
    adapter.row_out_bias.fill_(10.0), adapter.column_out_bias.fill_(10.0)  # U V^T = 200, and its sigmoid 1
    peft = get_peft_model(tiny.CAUSAL[kind](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=M))
    peft.prompt_encoder["default"].embedding.weight.copy_(adapter.prompt)
    ids = tiny.tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    close(model(ids).logits, peft(ids).logits[:, M:], 1e-5)
    got, wanted = model(ids, attention_mask=mask).logits, peft(ids, attention_mask=mask).logits[:, M:]
    close(got[0], wanted[0], 1e-5), close(got[1, :4], wanted[1, :4], 1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_equations_in_float64(encoder):
    model, plain = tiny.llama(), tiny.llama().double()
    adapter = lopa(model, encoder=encoder).adapters["prefix"]
    ids = tiny.tokens(1, 5)
    table = plain.get_input_embeddings().weight
    e = table[ids[0]].mean(0) if encoder == "embeddings" else plain.model(ids).last_hidden_state[0, -1]
    e = e / e.square().mean().sqrt()
    p = {name: value.double() for name, value in adapter.named_parameters()}
    U, V = (((torch.tanh(p[f"{side}_in"] @ e + p[f"{side}_in_bias"]) @ p[f"{side}_out"].T) + p[f"{side}_out_bias"]).reshape(-1, 2)
            for side in ("row", "column"))
    assert U.shape == (M, 2) and V.shape == (D, 2)
    Z = p["prompt"] * torch.sigmoid(U @ V.T)
    wanted = plain(inputs_embeds=torch.cat([Z, table[ids[0]]])[None]).logits[:, M:]
    close(model(ids).logits, wanted, 1e-5)
    other = plain(inputs_embeds=torch.cat([p["prompt"] / 2, table[ids[0]]])[None]).logits[:, M:]
    assert (other - wanted).abs().max() > 1e-3, "the gate takes part"


@pytest.mark.parametrize("m, r, encoder", [(1, 1, "base"), (5, 3, "base"), (10, 4, "embeddings")])
@torch.no_grad()
def test_rank_of_the_gate_and_count(m, r, encoder):
    graft = lopa(tiny.qwen3(), num_virtual_tokens=m, r=r, encoder=encoder)
    h = d = D
    assert graft.parameter_count() == m * d + 2 * (h * h + h) + (h + 1) * m * r + (h + 1) * d * r
    adapter = graft.adapters["prefix"]
    assert graft.parameter_count() == type(adapter).parameter_count(graft.adapters["prefix"], graft.config)
    U, V = adapter.gate(torch.randn(4, h))
    assert all(torch.linalg.matrix_rank(z) == min(r, m) for z in U @ V.transpose(1, 2))
    assert all(p.dtype == torch.float32 for p in graft.parameters())


@torch.no_grad()
def test_start():
    model = tiny.llama()
    adapter = lopa(model, size=0.0, num_virtual_tokens=20).adapters["prefix"]
    table = model.get_input_embeddings().weight
    assert (adapter.prompt[:, None] == table[None]).all(-1).any(1).all()
    U, V = adapter.gate(torch.randn(6, D))
    assert ((torch.sigmoid(U @ V.transpose(1, 2)) - 0.5).abs() < 0.05).all()
    assert 0.018 < adapter.row_in.std() < 0.022 and not adapter.row_out_bias.any()


# -- rows, padding, cache -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*tiny.CAUSAL, "sliding"])
@torch.no_grad()
def test_padded_batch_is_one_by_one(kind):
    if kind == "sliding":
        from transformers import MistralConfig

        sizes = tiny._shape(num_key_value_heads=2, sliding_window=5, initializer_range=0.1, **tiny.SPECIAL)
        model = tiny._build("AutoModelForCausalLM", MistralConfig(**sizes), 0)
    else:
        model = tiny.CAUSAL[kind]()
    lopa(model)
    rows = prompts(7, 3, 5)
    ids, mask, positions = padded(rows)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    ids, mask, _ = padded(rows, "right")
    right = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row])).logits[0]
        close(together[i, -len(row):], alone, 1e-5)
        close(right[i, :len(row)], alone, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_mixed_rows_are_the_rows_alone(kind):
    model = tiny.CAUSAL[kind]()
    lopa(model), lopa(model, "b", 5, num_virtual_tokens=5, encoder="embeddings")
    attach(model, "lora", name="l", seed=9)
    names, rows = ["b", None, "a", "l", "a"], prompts(4, 6, 3, 5, 6)
    ids, mask, positions = padded(rows)
    with graftwork.routing(model, names):
        filled = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        mixed, cache = filled.logits, filled.past_key_values
        more = tiny.tokens(len(rows), 2, 8)
        step = model(more, attention_mask=F.pad(mask, (0, 2), value=1), position_ids=positions[:, -1:] + torch.tensor([1, 2]),
                     past_key_values=cache, use_cache=True).logits
    for i, (name, row) in enumerate(zip(names, rows)):
        with only(model, name):
            alone = model(torch.tensor([row]), use_cache=True)
            close(mixed[i, -len(row):], alone.logits[0], 2e-5)
            after = model(more[i:i + 1], past_key_values=alone.past_key_values, use_cache=True).logits[0]
        close(step[i], after, 2e-5)
        if name in ("a", "b"):
            with only(model, None):
                assert (model(torch.tensor([row])).logits[0] - alone.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_cached_generation_is_uncached(kind):
    model, tokenizer, new = tiny.CAUSAL[kind](), tiny.tokenizer(), 6
    model.generation_config.eos_token_id = None
    graft, rows = lopa(model), prompts(6, 3, 4)

    def uncached(row, name):
        ids = list(row)
        with only(model, name):
            for _ in range(new):
                labels = torch.tensor([[-100] * len(row) + ids[len(row):]])  # what was written is no part of the instance
                with state_of(model).scope(labels=labels):
                    ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        return ids[len(row):]

    wanted = [uncached(row, "a") for row in rows]
    for batch in (1, 3):
        found = generate(model, tokenizer, rows, max_new_tokens=new, batch_size=batch)
        assert all(list(c.ids) == w[:len(c.ids)] and len(c.ids) > 0 for c, w in zip(found, wanted))
    names = ["a", None, "a"]
    mixed = generate(model, tokenizer, rows, adapters=names, max_new_tokens=new)
    assert all(list(c.ids) == uncached(r, n)[:len(c.ids)] for c, r, n in zip(mixed, rows, names))
    ids, mask, _ = padded(rows)
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    assert theirs[:, ids.shape[1]:].tolist() == wanted
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, pad_token_id=0)
    assert beams[:, :ids.shape[1]].tolist() == ids.tolist()
    with graft.disabled():
        assert [c.ids for c in generate(model, tokenizer, rows, max_new_tokens=new)] == \
            [c.ids for c in generate(model, tokenizer, rows, adapters=[None] * 3, max_new_tokens=new)]


@torch.no_grad()
def test_the_prefix_takes_room_in_the_context():
    model = tiny.gpt2()  # 256 learned positions
    model.generation_config.eos_token_id = None
    lopa(model)
    (found,) = generate(model, tiny.tokenizer(), prompts(249), max_new_tokens=9)
    assert found.tokens == 256 - M - 249 or found.finish_reason == "stop"


@torch.no_grad()
def test_rows_that_leave_a_batch_keep_the_cache_in_order():
    model = tiny.llama()
    lopa(model), lopa(model, "b", 4, num_virtual_tokens=1)
    rows, names = prompts(5, 4, 6, 3), ["a", None, "b", None]
    ids, mask, positions = padded(rows)
    keep = torch.tensor([1, 2])
    with graftwork.routing(model, names):
        cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        whole = model(torch.full((4, 1), 9), attention_mask=F.pad(mask, (0, 1), value=1), position_ids=positions[:, -1:] + 1,
                      past_key_values=cache, use_cache=True).logits
    cache.crop(-1), cache.batch_select_indices(keep)
    with graftwork.routing(model, [names[i] for i in keep]):  # the longest prefix has left
        rest = model(torch.full((2, 1), 9), attention_mask=F.pad(mask, (0, 1), value=1)[keep],
                     position_ids=positions[keep, -1:] + 1, past_key_values=cache, use_cache=True).logits
    close(rest, whole[keep], 1e-5)


# -- training ---------------------------------------------------------------------------------------------------------------
def test_the_prompt_of_a_row():
    ids = torch.ones(5, 6, dtype=torch.int64)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6, [0, 1, 1, 1, 1, 1]])
    labels = torch.full((5, 6), -100)
    labels[0, 3:], labels[1, 4:], labels[3], labels[4, 1:] = 1, 1, 1, 1
    wanted = [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert prompt_mask(ids, mask, labels).long().tolist() == wanted
    assert torch.equal(prompt_mask(ids, mask, None), mask.bool())


@pytest.mark.parametrize("encoder", [*ENCODERS, "folder"])
@torch.no_grad()
def test_the_answer_does_not_reach_the_prefix(encoder, tmp_path):
    model = tiny.llama()
    model.graft_tokenizer = tiny.tokenizer()
    encoder = str(tiny.save(tiny.bert(), tmp_path / "encoder")) if encoder == "folder" else encoder
    lopa(model, encoder=encoder, size=0.5)
    one = tiny.tokens(2, 8)
    other = one.clone()
    other[:, 5:] = tiny.tokens(2, 3, 77)
    labels = one.clone()
    labels[:, :5] = -100
    seen = [model(ids, labels=labels).logits[:, :5] for ids in (one, other)]
    assert torch.equal(*seen)
    assert (model(one).logits[:, :5] - seen[0]).abs().max() > 1e-4, "without labels all input is prompt"
    with state_of(model).scope(labels=labels):
        assert torch.equal(model(one).logits[:, :5], seen[0])
    prompt = model(one[:, :5]).logits
    close(seen[0], prompt, 1e-5)  # training and generation see the same prefix
    hidden = CausalLMObjective()
    batch = {"input_ids": one, "labels": labels, "attention_mask": torch.ones_like(one)}
    with state_of(model).scope(labels=labels):
        loss = hidden.loss(model, batch, 1 / 6).loss
    close(loss, model(one, labels=labels).loss, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gradients_reach_the_graft_only_and_learning_works(kind):
    model = tiny.CAUSAL[kind](**({"output_router_logits": True} if kind == "mixtral" else {}))
    graft = lopa(model, size=0.0)
    own = {id(p) for p in graft.parameters()}
    model.train()
    ids = tiny.tokens(3, 8)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :4] = -100
    rng = torch.get_rng_state()
    optimizer, losses = torch.optim.Adam(graft.parameters(), lr=2e-2), []
    for step in range(8):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if not step:
            assert all((p.grad is not None) == (id(p) in own) for p in model.parameters())
            assert all(p.grad.abs().sum() > 0 for p in graft.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(rng, torch.get_rng_state())
    assert losses[-1] < 0.9 * losses[0], losses


def test_checkpointed_gradients_are_equal_and_dropout_follows_the_clock():
    model = tiny.llama()
    grafts = [lopa(model, dropout=0.4), lopa(model, "b", 3, num_virtual_tokens=2)]
    model.train()
    ids, state = tiny.tokens(3, 6), state_of(model)

    def gradients(step=3):
        model.zero_grad()
        with state.scope(step=step, labels=torch.full_like(ids, -100)), graftwork.routing(model, ["a", "b", None]):
            loss = model(ids, attention_mask=torch.ones_like(ids)).logits.square().mean()
        loss.backward()
        return [p.grad.clone() for g in grafts for p in g.parameters()]

    plain = gradients()
    assert any(not torch.equal(x, y) for x, y in zip(plain, gradients(4)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=state.checkpoint_kwargs())
    assert all(torch.equal(x, y) for x, y in zip(plain, gradients(), strict=True))


def test_absent_grafts_get_no_gradient_and_rows_train_as_alone():
    model = tiny.llama()
    a, b, c = lopa(model), lopa(model, "b", 3, num_virtual_tokens=2), lopa(model, "c", 4)
    ids = tiny.tokens(2, 6)

    def gradients(graft, rows, batch):
        model.zero_grad()
        with graftwork.routing(model, rows):
            model(batch, attention_mask=torch.ones_like(batch)).logits[rows.index(graft.name)].square().sum().backward()
        return [p.grad for p in graft.parameters()]

    mixed = gradients(a, ["a", "b"], ids)
    assert all(p.grad is None for p in c.parameters())
    for x, y in zip(mixed, gradients(a, ["a"], ids[:1])):
        close(x, y, 1e-4)
    close(gradients(b, ["a", "b"], ids)[0], gradients(b, ["b"], ids[1:])[0], 1e-4)


# -- files, recipes, plans ------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_an_encoder_is_bound_by_its_fingerprint(tmp_path):
    place, ids = tmp_path / "encoder", tiny.tokens(2, 5)
    tiny.save(tiny.bert(), place)
    model = tiny.llama()
    model.graft_tokenizer = tiny.tokenizer()
    graft = lopa(model, encoder=str(place), size=0.3)
    learned = model(ids).logits
    graft.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "graft.json").read_text())
    assert card["sites"] == {"prefix": [D, D, 2]} and len(card["extra"]["prefix"]["encoder_fingerprint"]) == 64
    assert not any("encoder" in key for key in card["tensors"]), "the encoder's weights are not saved"
    again = tiny.llama()
    again.graft_tokenizer = tiny.tokenizer()
    graftwork.attach_saved(again, tmp_path / "saved")
    assert torch.equal(again(ids).logits, learned)
    tiny.save(tiny.bert(seed=1), place)
    other = tiny.llama()
    state = list(other.state_dict())
    with pytest.raises(ArtifactError, match="another encoder"):
        graftwork.attach_saved(other, tmp_path / "saved")
    assert list(other.state_dict()) == state and not state_of(other).grafts and "graft_prefix_scope" not in other.__dict__


@pytest.mark.slow
def test_a_recipe_is_planned_and_trained(tmp_path):
    model, file = folder(tmp_path), completions(tmp_path / "train.jsonl")
    adapter = {"method": "lopa", "num_virtual_tokens": 4, "r": 2}
    document = recipe(model, file, tmp_path / "out", adapter=adapter, train={"max_steps": 5})
    planned = graftwork.plan(document, estimate_time=False)
    h = d = D
    assert planned.trained == 4 * d + 2 * (h * h + h) + (h + 1) * 2 * (4 + d)
    run(document)
    losses = [row["loss"] for row in log_of(tmp_path / "out") if "loss" in row]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    card = json.loads((tmp_path / "out" / "graft" / "graft.json").read_text())
    assert card["method"] == "lopa" and card["parameters"] == planned.trained
    with pytest.raises(UsageError, match="packed rows hold several"):
        graftwork.plan(recipe(model, file, tmp_path / "out", adapter=adapter, data={"packing": True}))


@pytest.mark.slow
def test_the_plan_counts_prefix_and_encoder(tmp_path):
    model, encoder = folder(tmp_path), tiny.save(tiny.bert(), tmp_path / "encoder")

    def planned(**adapter):
        document = recipe(model, tmp_path / "none", tmp_path / "out", adapter={"method": "lopa", "r": 2, **adapter})
        return graftwork.plan(document, estimate_time=False, use_data=False)

    plain, separate = planned(encoder="embeddings"), planned(encoder=str(encoder))
    assert planned(encoder="embeddings", num_virtual_tokens=40).peak_bytes > plain.peak_bytes
    weights = sum(p.numel() * 4 for p in tiny.bert().parameters())
    assert separate.trained == plain.trained and separate.peak_bytes >= plain.peak_bytes + 0.9 * weights


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_step_on_fake_tensors(encoder):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = tiny.llama()
        graft = lopa(model, encoder=encoder)
        ids = torch.ones(2, 7, dtype=torch.int64)
        model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        assert all(p.grad.shape == p.shape for p in graft.parameters())


# -- what is refused ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_refusals(tmp_path):
    model, ids = tiny.gpt2(), tiny.tokens(2, 6)
    before = list(model.state_dict())
    graft = lopa(model)
    for call in (graft.merge, graft.to_lora, graft.delta_weights, lambda: graft.scale(0.5)):
        with pytest.raises(UsageError):
            call()
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with pytest.raises(IncompatibleError, match="packed rows hold several"):
        model(ids, position_ids=packed)
    close(model(ids, position_ids=torch.arange(6)[None]).logits, model(ids).logits, 1e-6)
    with pytest.raises(IncompatibleError, match="inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(IncompatibleError, match="token_type_ids"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(UsageError, match="256"):
        model(tiny.tokens(1, 254))
    with pytest.raises(UsageError, match="do not belong"), state_of(model).scope(labels=ids[:1]):
        model(ids)
    with graft.disabled():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="without this graft's prefix"):
        model(ids[:, :1], past_key_values=cache)
    second = lopa(model, "b", 2)
    with pytest.raises(IncompatibleError, match="all put a prefix"):
        model(ids)
    with second.disabled():
        model(ids)
    with pytest.raises(UsageError, match="names 1 rows"), graftwork.routing(model, ["a"]):
        model(ids)
    with pytest.raises(IncompatibleError, match="initializer"):
        graftwork.attach(model, "lopa", name="c", initializer="pissa")
    graft.detach(), second.detach()
    assert list(model.state_dict()) == before and not model.transformer._forward_pre_hooks and not model._forward_hooks
    with pytest.raises(IncompatibleError, match="no causal decoder"):
        graftwork.attach(tiny.bert(), "lopa")
    with pytest.raises(graftwork.GraftworkError):
        graftwork.attach(model, "lopa", encoder=str(tmp_path / "nowhere"))
    assert list(model.state_dict()) == before and not state_of(model).grafts


def test_training_without_labels_warns_once():
    model, ids = tiny.llama(), tiny.tokens(2, 5)
    lopa(model)
    model.train()
    with pytest.warns(UserWarning, match="answers included"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        model(ids, labels=ids)


@pytest.mark.slow
@torch.no_grad()
def test_with_a_sentence_encoder():
    from graftwork.modeling.models import load_model

    model, rows = tiny.llama(), ["the best in the test", "one and all"]
    model.graft_tokenizer = tiny.tokenizer()
    graft = lopa(model, encoder="all-minilm-l6-v2", r=4)
    h, d = 384, D
    assert graft.parameter_count() == M * d + 2 * (h * h + h) + (h + 1) * M * 4 + (h + 1) * d * 4
    encoder, tokenizer = load_model("all-minilm-l6-v2", task="encoder")
    adapter = graft.adapters["prefix"]
    from graftwork.adapters.model_scope import PrefixScope, Prompts

    ids, mask, _ = padded([model.graft_tokenizer(row)["input_ids"] for row in rows])
    got = adapter.encode(Prompts(ids, mask.bool()), PrefixScope.of(model).base)
    for i, row in enumerate(rows):
        states = encoder(**tokenizer(row, return_tensors="pt")).last_hidden_state[0].double()
        wanted = F.normalize(states.mean(0), dim=0) * h**0.5
        close(got[i], wanted, 1e-4)
    U, V = adapter.gate(got)
    assert all(torch.linalg.matrix_rank(z) <= 4 for z in U @ V.transpose(1, 2))
