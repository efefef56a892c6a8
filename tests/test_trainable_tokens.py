"""Rows of tokens and whole modules beside an adapter: against a dense float64 model, in batches, on disk, and at every other reader."""

import json
import warnings
from copy import deepcopy

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import graftwork
import tiny
from adapter_support import EVERYWHERE, attach, close, fill, on_base
from graftwork.errors import ArtifactError, IncompatibleError, UsageError
from graftwork.interchange.combine import combine
from graftwork.interchange.gguf import write_gguf_adapter, write_gguf_merged
from graftwork.interchange.lora import write_lora
from graftwork.interchange.merged import write_merged
from graftwork.interchange.mlx import write_mlx
from graftwork.interchange.peft import write_peft
from graftwork.objectives import _head
from graftwork.objectives.causal_lm import CausalLM, CausalLMObjective
from graftwork.planning.measure import measure_peak
from graftwork.planning.simulate import count_parameters, plan
from graftwork.recipe import load_recipe
from graftwork.registry import lookup, methods
from graftwork.training.trainer import GraftTrainer
from training_support import assert_identical, completions, folder, recipe, run, tensors_of

pytestmark = pytest.mark.slow

IDS = [7, 30, 99]
#: ids in which every named token occurs, some of them twice, and in every row
TEXT = torch.tensor([[30, 5, 7, 61, 30, 99, 12, 44], [99, 7, 18, 30, 30, 7, 63, 5], [4, 99, 4, 7, 90, 91, 30, 8],
                     [7, 8, 9, 99, 11, 30, 7, 13]])


def untied(**more):
    return tiny.llama(tied=False, **more)


def gemma(**more):
    """An embedding that scales what it looks up, a tied head, and a cap on the logits."""
    from transformers import Gemma2Config

    sizes = tiny._shape(num_key_value_heads=tiny.KV_HEADS, head_dim=16, initializer_range=0.1, **tiny.SPECIAL)
    return tiny._build("AutoModelForCausalLM", Gemma2Config(**{**sizes, **more}), 0)


KINDS = {"tied": (tiny.llama, IDS, True), "untied": (untied, IDS, False), "gpt2": (tiny.gpt2, IDS, True), "gemma": (gemma, IDS, True),
         "head too": (untied, {"embed_tokens": IDS, "lm_head": [7, 50]}, False),
         "head alone": (untied, {"lm_head": IDS}, False),
         "head of a tied model": (tiny.llama, {"lm_head": [7, 50]}, False),
         "tied, other tokens": (tiny.llama, {"embed_tokens": IDS, "lm_head": [7, 50]}, False)}


def logits(model, ids=TEXT):
    with torch.no_grad():
        return model(ids).logits


def lora(model, tokens=IDS, name="a", seed=1, **options):
    graft = graftwork.attach(model, "lora", name=name, **{"r": 3, "target_modules": ["q_proj", "c_attn"], "trainable_tokens": tokens,
                                                          **options})
    return fill(graft, seed)


def dense(plain, *grafts):
    """A float64 copy of the ungrafted model with the changes of grafts written into its matrices; its head has a weight of its own."""
    model = deepcopy(plain).double()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    head.weight = nn.Parameter(head.weight.detach().clone())
    names = {name: module for name, module in model.named_modules()}
    for graft in grafts:
        for name, change in graft.delta_weights().items():
            weight = names[name].weight.data
            weight += change.double().T if weight.shape == change.T.shape and "Conv1D" in type(names[name]).__name__ else change.double()
        for name, tokens in graft.trainable_tokens.items():
            change = graft.weight * (tokens.rows - tokens.origin).detach().double()
            both = names[name] is embedding and tied and head in [names[n] for n in tokens.modules_using]
            for module in [names[name], *([head] if both else [])]:
                module.weight.data.index_add_(0, tokens.ids, change)
    return model


# -- what it computes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_changed_matrices(kind):
    build, tokens, both = KINDS[kind]
    plain, model = build(), build()
    base = logits(model)
    graft = graftwork.attach(model, "lora", r=3, target_modules=["q_proj", "c_attn"], trainable_tokens=tokens)
    assert torch.equal(logits(model), base)  # it starts as the model itself
    fill(graft, 1)
    wanted = logits(dense(plain, graft))
    close(logits(model), wanted, 1e-5)
    assert (wanted - base).abs().max() > 0.05
    named = tokens if isinstance(tokens, dict) else {"": tokens}
    own = sum(p.numel() for a in graft.adapters.values() for p in a.parameters())
    assert graft.parameter_count() - own == sum(map(len, named.values())) * plain.get_input_embeddings().embedding_dim
    assert all(len(t.modules_using) == 1 + both for t in graft.trainable_tokens.values())
    decay = {name: group.get("weight_decay") for group in graft.parameter_groups() for name in group["names"]}
    assert {name for name, value in decay.items() if value == 0.0} == {f"trainable_tokens.{n}.rows" for n in graft.trainable_tokens}
    with graft.disabled():
        assert torch.equal(logits(model), base)
    graft.scale(0.5)
    close(logits(model), logits(dense(plain, graft)), 1e-5)
    graft.scale(1.0)
    graft.detach()
    assert torch.equal(logits(model), base) and not any(".graft" in n for n, _ in model.named_modules())
    assert type(model.get_input_embeddings()) is type(plain.get_input_embeddings())


@pytest.mark.parametrize("kind", ["tied", "untied", "gemma", "head too"])
@pytest.mark.parametrize("masked_head", [True, False])
def test_gradient_comes_through_both_uses(kind, masked_head):
    build, tokens, both = KINDS[kind]
    plain, model = build(), build()
    graft = lora(model, tokens)
    labels = TEXT.clone()
    labels[:, :2] = -100
    out = CausalLMObjective(CausalLM(chunk_tokens=5, masked_head=masked_head)).loss(model, {"input_ids": TEXT, "labels": labels}, 0.1)
    out.loss.backward()
    other = dense(plain, graft)
    embedding, head = other.get_input_embeddings().weight, other.get_output_embeddings().weight
    wanted = F.cross_entropy(other(TEXT).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") * 0.1
    wanted.backward()
    close(out.loss, wanted, 1e-5)
    for name, rows in graft.trainable_tokens.items():
        grad = (head if "lm_head" in name else embedding).grad + (head.grad if both else 0)
        assert (grad[rows.ids].norm(dim=1) > 1e-3).all()
        close(rows.rows.grad, grad[rows.ids], 1e-4)


def test_bf16_update_below_the_resolution_of_the_matrix_is_not_lost_in_the_head():
    model = tiny.llama(dtype=torch.bfloat16)
    base = logits(model).float()
    graft = graftwork.attach(model, "lora", r=1, trainable_tokens=IDS)
    assert torch.equal(logits(model).float(), base)
    hidden = model.model(TEXT).last_hidden_state.detach()
    rows = graft.trainable_tokens["model.embed_tokens"].rows
    with torch.no_grad():
        rows += rows * 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert torch.equal(rows.bfloat16(), graft.trainable_tokens["model.embed_tokens"].origin.bfloat16())
    assert not torch.equal(model.lm_head(hidden)[..., IDS], F.linear(hidden, model.lm_head.weight)[..., IDS])


# -- many grafts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tied", "untied", "gemma"])
def test_rows_of_a_batch_see_their_own_tokens(kind):
    build = KINDS[kind][0]
    model = build()
    base = logits(model)
    a, b = lora(model, [7, 30, 99], "a", 1), lora(model, [99, 4], "b", 2, r=2)
    attach(model, "ia3", name="c")
    alone = {None: base}
    for name in "abc":
        with graftwork.routing(model, [name] * 4):
            alone[name] = logits(model)
    close(alone["a"], logits(dense(build(), a)), 1e-5)
    assert (alone["a"] - alone["b"]).abs().max() > 0.05
    rows = ["b", None, "c", "a"]
    with graftwork.routing(model, rows):
        close(logits(model), torch.stack([alone[name][i] for i, name in enumerate(rows)]), 1e-5)
        with b.disabled():
            assert torch.allclose(logits(model)[0], base[0], atol=1e-5)
    with graftwork.routing(model, ["a", "b"], expansion=2):
        close(logits(model), torch.cat([alone["a"][:2], alone["b"][2:]]), 1e-5)
    a.scale(0.5)
    with graftwork.routing(model, ["a", None, "b", "a"]):
        mixed = logits(model)
    close(mixed[[0, 3]], logits(dense(build(), a))[[0, 3]], 1e-5)
    model.graft_state.grafts["c"].detach()
    close(logits(model), logits(dense(build(), a, b)), 1e-5)  # both on every row: their changes add up


def test_gradients_of_a_fleet_are_those_of_its_members(monkeypatch):
    monkeypatch.setattr(_head, "_module_loss", None)  # tokens alone leave the chunked loss as quick as it is
    model = tiny.llama()
    grafts = {"a": lora(model, [7, 30], "a", 1), "b": lora(model, [99, 4, 7], "b", 2)}
    grafts["b"].scale(0.5)
    batch = {"input_ids": TEXT, "labels": TEXT}

    def gradients(names, rows, **options):
        model.zero_grad()
        with graftwork.routing(model, names):
            loss = CausalLMObjective(CausalLM(chunk_tokens=6, **options)).loss(model, {k: v[rows] for k, v in batch.items()}).loss
        loss.backward()
        return loss.item(), {f"{n}/{k}": p.grad for n, g in grafts.items() for k, p in g.named_parameters() if p.grad is not None}

    loss, mixed = gradients(["a", "b", "b", None], [0, 1, 2, 3])
    wanted, of_all_logits = gradients(["a", "b", "b", None], [0, 1, 2, 3], masked_head=False)
    alone = {**gradients(["a"], [0])[1], **gradients(["b"] * 2, [1, 2])[1]}
    assert abs(loss - wanted) < 1e-3 and mixed.keys() == of_all_logits.keys() == alone.keys()
    for key, grad in mixed.items():
        close(grad, of_all_logits[key], 1e-4)
        close(grad, alone[key], 1e-4)
    assert mixed["a/trainable_tokens.model.embed_tokens.rows"].abs().sum() > 0


def test_adapter_on_the_head_and_tokens_of_a_tied_model_add_up():
    plain, model = tiny.llama(), tiny.llama()
    graft = lora(model, IDS, target_modules=["q_proj", "lm_head"])
    close(logits(model), logits(dense(plain, graft)), 1e-5)
    with graftwork.routing(model, ["a", None, "a", "a"]):
        close(logits(model)[[0, 2, 3]], logits(dense(plain, graft))[[0, 2, 3]], 1e-5)
    with pytest.raises(IncompatibleError, match="merging would change both"):
        graft.merge()


def test_prefix_before_texts_with_tokens_of_their_own():
    """A prefix is computed from the bare base; the text of its row is read with the row's tokens."""
    model = tiny.llama()
    for name, method in {"p": "prefix", "o": "prompt", "l": "lopa"}.items():
        attach(model, method, name=name, trainable_tokens=IDS)
    lora(model, [30], "a")
    names = ["p", "a", "o", "l"]
    alone = []
    for i, name in enumerate(names):
        with graftwork.routing(model, [name]):
            alone.append(logits(model, TEXT[i:i + 1]))
    with graftwork.routing(model, names):
        close(logits(model), torch.cat(alone), 1e-5)


# -- choosing tokens ---------------------------------------------------------------------------------------------------------
def test_tokens_by_name():
    model = tiny.llama()
    with pytest.raises(UsageError, match="tokenizer is not known"):
        lora(model, ["th"])
    model.graft_tokenizer = tiny.tokenizer()
    graft = lora(model, ["user", 5, " the", "<|im_start|>"])
    vocabulary = model.graft_tokenizer.get_vocab()
    assert graft.config.trainable_tokens == sorted([vocabulary["user"], 5, vocabulary["Ġthe"], 1])
    for tokens, words in {("tea cup",): "no token of this model's tokenizer.*'t', 'e', 'a'", ("\u00e9",): "no token",
                          (5, 5): "named twice", ("user", vocabulary["user"]): "named twice", (128,): "not one of the 128 rows",
                          (-1,): "not one of the 128"}.items():
        with pytest.raises(UsageError, match=words) as caught:
            lora(model, list(tokens), "b")
        assert caught.value.remedy
        assert list(model.graft_state.grafts) == ["a"]
    for tokens, words in {"lm_heed": "did you mean 'lm_head'", "q_proj": "no embedding and no output head"}.items():
        with pytest.raises(UsageError, match=words):
            lora(model, {tokens: [5]}, "b")
    with pytest.raises(UsageError, match="names a module and no token"):
        lora(model, {"lm_head": []}, "b")
    with pytest.raises(UsageError, match="trained whole already"):
        lora(untied(), {"lm_head": [5]}, modules_to_save=["lm_head"])
    with pytest.raises(IncompatibleError, match="changes the product of 'lm_head'"):
        attach(untied(), "oft", target_modules=["lm_head"], trainable_tokens={"lm_head": [5]})
    with pytest.raises(UsageError, match="trainable_tokens"):
        lora(model, [1.5], "b")


def test_new_tokens_of_a_resized_model(tmp_path):
    base = folder(tmp_path)

    def resized():
        made, tokenizer = graftwork.load(base)
        tokenizer.add_tokens(["<tool>", "<answer>"])
        made.resize_token_embeddings(len(tokenizer))
        made.graft_tokenizer = tokenizer
        return made

    model, text = resized(), torch.tensor([[128, 5, 129, 7, 128], [4, 4, 128, 129, 9]])
    plain = deepcopy(model)
    graft = lora(model, ["<answer>", "<tool>"])
    wanted = logits(model, text)
    close(wanted, logits(dense(plain, graft), text), 1e-5)
    graft.save(tmp_path / "g")
    again = resized()  # its new rows were drawn anew: the learned ones take their place
    graftwork.attach_saved(again, tmp_path / "g")
    close(logits(again, text), wanted, 1e-5)
    model.resize_token_embeddings(140)
    close(logits(model, text)[..., :130], wanted, 1e-5)
    with pytest.raises(UsageError, match="not one of the 128 rows") as caught:
        graftwork.attach_saved(graftwork.load(base)[0], tmp_path / "g")
    assert "resize_token_embeddings(130)" in caught.value.remedy
    for kind in ("trained", "pristine"):
        write_merged(graftwork.attach_saved(again, tmp_path / "g", name=kind), tmp_path / kind, base=kind)
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / kind), text), wanted, 1e-5)
        again.graft_state.grafts[kind].detach()


# -- on disk -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tied", "untied", "head too", "tied, other tokens"])
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    build, tokens, _ = KINDS[kind]
    model = build()
    graft = lora(model, tokens)
    wanted = logits(model)
    graft.save(tmp_path / "g")
    tensors = load_file(tmp_path / "g" / "graft.safetensors")
    rows = {k: tuple(t.shape) for k, t in tensors.items() if not k.startswith("model.layers")}
    named = tokens if isinstance(tokens, dict) else {"model.embed_tokens": tokens}
    assert sorted(rows.values()) == sorted((len(ids), 64) for ids in named.values()) and all(k.endswith(".rows") for k in rows)
    assert not any(t.numel() >= 128 * 64 for t in tensors.values())
    other = build()
    again = graftwork.attach_saved(other, tmp_path / "g")
    assert torch.equal(logits(other), wanted) and not any(p.requires_grad for p in again.parameters())
    trained = graftwork.attach_saved(build(), tmp_path / "g", trainable=True)
    assert trained.parameter_count() == graft.parameter_count()
    card = json.loads((tmp_path / "g" / "graft.json").read_text())
    card["config"]["trainable_tokens"] = [8, 30, 99]
    (tmp_path / "g" / "graft.json").write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="checksum"):
        graftwork.attach_saved(build(), tmp_path / "g")


def test_tokens_alone_are_a_change(tmp_path):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", r=2, trainable_tokens=IDS)
    graft.save(tmp_path / "g")
    with pytest.raises(ArtifactError, match="changes nothing"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "g")
    with torch.no_grad():
        graft.trainable_tokens["model.embed_tokens"].rows[1, 3] += 1.0
    graft.save(tmp_path / "g")
    other = tiny.llama()
    graftwork.attach_saved(other, tmp_path / "g")
    assert torch.equal(logits(other), logits(model))


# -- PEFT --------------------------------------------------------------------------------------------------------------------
PEFT = {"tied": IDS, "untied": IDS, "gpt2": IDS, "head too": {"embed_tokens": IDS, "lm_head": [7, 50]}, "head alone": {"lm_head": IDS},
        "tied, both named": {"embed_tokens": IDS, "lm_head": IDS}, "tied, other tokens": {"embed_tokens": IDS, "lm_head": [7, 50]}}


def through_peft(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, str(path)).eval()


@pytest.mark.parametrize("kind, method", [*((kind, "lora") for kind in PEFT), ("tied", "dora"), ("head too", "kasa"), ("tied", "adalora")])
def test_through_peft(kind, method, tmp_path):
    build = KINDS.get(kind, (tiny.llama,))[0]
    model = build()
    graft = attach(model, method, target_modules=["q_proj", "c_attn"], trainable_tokens=PEFT[kind])
    graft.scale(0.5 if method == "lora" else 1.0)
    wanted = logits(model)
    write_peft(graft, tmp_path / "x")
    theirs = through_peft(build(), tmp_path / "x")
    close(logits(theirs), wanted, 1e-5)
    other = build()
    close(logits(other), logits(build()), 0)
    graftwork.attach_saved(other, tmp_path / "x")
    close(logits(other), wanted, 1e-5)


@pytest.mark.parametrize("kind", PEFT)
def test_from_peft(kind, tmp_path):
    build = KINDS.get(kind, (tiny.llama,))[0]
    tokens = PEFT[kind] if isinstance(PEFT[kind], dict) else [99, 7, 30]  # not in ascending order
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "c_attn"],
                                                              trainable_token_indices=tokens)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.1
        theirs.save_pretrained(tmp_path / "x")
    model = build()
    graft = graftwork.attach_saved(model, tmp_path / "x")
    close(logits(model), logits(theirs), 1e-5)
    write_peft(graft, tmp_path / "y")
    mine, keys = load_file(tmp_path / "y" / "adapter_model.safetensors"), load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert sorted(mine) == sorted(keys)
    document = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    document["trainable_token_indices"] = None
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="tokens that the config does not name"):
        graftwork.attach_saved(build(), tmp_path / "x")


# -- other readers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tied", "untied", "head too", "tied, other tokens", "head of a tied model"])
def test_merged(kind, tmp_path):
    build, tokens, both = KINDS[kind]
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = logits(model)
    graft = lora(model, tokens)
    graft.scale(0.75)
    wanted = logits(model)
    report = write_merged(graft, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    close(logits(again), wanted, 1e-5)
    assert torch.equal(logits(model), wanted)
    assert again.config.tie_word_embeddings == (kind == "tied") and report.worst < 1e-3
    assert any("(tokens)" in key for key in report.errors)
    if kind in ("tied, other tokens", "head of a tied model"):
        with pytest.raises(IncompatibleError, match="merging would change both"):
            graft.merge()
        return
    report = graft.merge()
    close(logits(model), wanted, 1e-5)
    assert any("(tokens)" in key for key in report.errors)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"]) == (kind == "untied")
    with pytest.raises(UsageError, match="merged"), graftwork.routing(model, ["a"] * 4):
        pass
    graft.unmerge()
    assert torch.equal(logits(model), wanted)
    graft.merge()
    graft.detach()
    assert torch.equal(logits(model), base) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_readers_write_them_or_say_why_not(tmp_path):
    model = tiny.llama()
    graft = lora(model, IDS, target_modules=["q_proj", "up_proj"])
    wanted = logits(model)
    refused = {"llama.cpp's adapters hold no rows": lambda: write_gguf_adapter(graft, tmp_path / "x", tokenizer=tiny.tokenizer()),
               "mlx-lm's adapters do not hold rows": lambda: write_mlx(graft, tmp_path / "x"),
               "vLLM and LoRAX refuse that": lambda: write_peft(graft, tmp_path / "x", style="baked"),
               "holds rows of tokens": lambda: combine([graft])}
    for words, write in refused.items():
        with pytest.raises(IncompatibleError, match=words) as caught:
            write()
        assert caught.value.remedy and not (tmp_path / "x").exists()
    with pytest.raises(IncompatibleError, match="'prompt' have no place for them"):
        write_peft(attach(tiny.llama(), "prompt", trainable_tokens=IDS), tmp_path / "x")
    with pytest.raises(IncompatibleError, match="PEFT's IA3 holds no rows"):
        write_peft(attach(tiny.llama(), "ia3", trainable_tokens=IDS), tmp_path / "x")
    with pytest.raises(IncompatibleError, match="beside another change of 'lm_head'"):
        write_peft(lora(tiny.llama(), IDS, target_modules=["lm_head"]), tmp_path / "x")
    with pytest.raises(IncompatibleError, match="beside another change of 'lm_head'"):
        write_peft(lora(tiny.llama(), IDS, modules_to_save=["lm_head"]), tmp_path / "x")
    write_gguf_merged(graft, tmp_path / "g", tokenizer=tiny.tokenizer(), dtype="f32")
    close(logits(graftwork.load(tmp_path / "g" / "model.gguf")[0]), wanted, 1e-5)


@pytest.mark.parametrize("method", ["nola", "flora"])
def test_as_lora(method, tmp_path):
    model = tiny.llama()
    graft = attach(model, method, trainable_tokens=IDS)
    if method == "nola":
        graft.scale(0.5)
    wanted = logits(model)
    write_lora(graft, tmp_path / "x", rank=None if method == "nola" else 64)
    other = tiny.llama()
    again = graftwork.attach_saved(other, tmp_path / "x")
    assert again.method == "lora"
    close(logits(other), wanted, 1e-4)


# -- training ----------------------------------------------------------------------------------------------------------------
def test_run_with_tokens_by_name_killed_and_resumed(tmp_path, monkeypatch):
    model, rows = folder(tmp_path), completions(tmp_path / "rows.jsonl", 12)

    def document(out):
        return recipe(model, rows, tmp_path / out, adapter={"method": "lora", "r": 2, "trainable_tokens": ["Ġthe", "in"]},
                      train={"max_steps": 4, "save_steps": 2})

    run(document("whole"))
    plain = GraftTrainer.training_step

    def killing(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GraftTrainer, "training_step", killing)
        with pytest.raises(KeyboardInterrupt):
            run(document("killed"))
    run(document("killed"), resume=True)
    assert_identical(tensors_of(tmp_path / "killed" / "graft"), tensors_of(tmp_path / "whole" / "graft"))
    loaded, tokenizer = graftwork.load(model)
    start = loaded.get_input_embeddings().weight[sorted(tokenizer.convert_tokens_to_ids(["Ġthe", "in"]))]
    moved = tensors_of(tmp_path / "whole" / "graft")["graft.safetensors/trainable_tokens.model.embed_tokens.rows"] - start
    assert (moved.norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("tokens", [None, "both"])
def test_planner_counts_them(tokens, tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, vocab_size=1024)
    path = tiny.save(tiny.llama(**sizes), tmp_path / "model", with_tokenizer=False)
    names = list(range(3, 203))
    document = {"model": str(path), "data": {"train": "absent.jsonl", "max_length": 96}, "adapter": {
        "method": "lora", "r": 2, "target_modules": ["q_proj"], **({"trainable_tokens": names} if tokens else {})},
        "train": {"batch_size": 4, "precision": "fp32", "max_steps": 10}}
    from graftwork.planning import simulate
    from graftwork.training.build import build_grafts, build_model, build_step

    loaded = load_recipe(document)
    made = plan(loaded, use_data=False, estimate_time=False)
    others = measure_peak(lambda: None).baseline_bytes
    model, _ = build_model(loaded)
    step = build_step(loaded, model, build_grafts(loaded, model), 10)
    model.train()
    batches = simulate._from_shape(loaded)[0]
    step.run(batches, 0)
    assert sum(p.numel() for _, p in step.parameters) == count_parameters(loaded)[0] == made.trained
    measured = measure_peak(lambda: step.run(batches, 1)).peak_bytes - others
    assert abs(made.peak_bytes - measured) / measured < 0.02
    if tokens:
        document["adapter"]["trainable_tokens"] = names[:1]
        fewer = plan(load_recipe(document), use_data=False, estimate_time=False)
        size = 199 * 128 * 4
        difference = {k: made.categories[k] - fewer.categories[k] for k in ("adapters", "gradients", "optimizer_state")}
        assert difference["adapters"] == 2 * size + 199 * 8  # rows, their origin, ids
        assert difference["optimizer_state"] == 2 * size


# -- every method ------------------------------------------------------------------------------------------------------------
BESIDE = {"module": {"modules_to_save": ["lm_head"]}, "tokens": {"trainable_tokens": IDS}}


#: one of each kind of operator, in every run; the others in all but the quickest
SOON = (*EVERYWHERE, "ia3", "dora", "spiel", "bottleneck", "prompt")


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", [pytest.param(info.name, marks=[] if info.name in SOON else [pytest.mark.slow])
                                    for info in methods("adapter")])
def test_beside_every_method(method, beside, tmp_path):
    model = on_base(untied(), method, tmp_path)
    base = logits(model)
    options = {**BESIDE[beside], **({"layers_to_transform": [1]} if lookup("adapter", method).traits["scope"] == "site" else {})}
    a, b = attach(model, method, name="a", **options), attach(model, method, name="b", seed=5, **options)
    alone = {None: base}
    for name in "ab":
        with graftwork.routing(model, [name] * 4):
            alone[name] = logits(model)
    b_rows = ["b", None, "a", "b"]
    with graftwork.routing(model, b_rows):
        close(logits(model), torch.stack([alone[name][i] for i, name in enumerate(b_rows)]), 1e-4)
    own = {k: v for k, v in a.named_parameters() if k.startswith(("modules_to_save.", "trainable_tokens."))}
    assert [tuple(v.shape) for v in own.values()] == [(128, 64) if beside == "module" else (3, 64)]
    with graftwork.routing(model, ["a", "b", "a", "a"]):
        (model(TEXT).logits[:, :-1] ** 2).mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in own.values())
    b.detach()
    a.save(tmp_path / "g")
    other = on_base(untied(), method, tmp_path)
    graftwork.attach_saved(other, tmp_path / "g")
    close(logits(other), logits(model), 0 if method not in ("binary_adapter", "binary_lora") else 1e-6)
    try:
        write_merged(a, tmp_path / "m")
    except IncompatibleError as error:
        assert error.remedy and not a.info.traits["mergeable"]
    else:
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model), 1e-4)
    try:
        write_peft(a, tmp_path / "p")
    except UsageError as error:
        assert error.remedy
    else:
        again = untied()
        graftwork.attach_saved(again, tmp_path / "p")
        close(logits(again), logits(model), 1e-4)
    a.detach()
    assert torch.equal(logits(model), base)


def test_module_trained_whole_has_no_adapter():
    model = untied()
    graft = graftwork.attach(model, "lora", r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert set(graft.saved_modules) == {"lm_head"} and "lm_head" not in graft.adapters and len(graft.adapters) == 2
    with pytest.raises(UsageError, match="every module that target_modules matches is trained whole"):
        graftwork.attach(model, "lora", name="b", r=2, target_modules=["lm_head"], modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match="has an adapter of 'mixlora' already"):
        attach(model, "mixlora", name="b", modules_to_save=["down_proj"])
    for name, words in {"lm_heed": "did you mean 'lm_head'", "norm": "not a linear map"}.items():
        with pytest.raises(UsageError, match=words) as caught:
            graftwork.attach(model, "lora", name="b", r=2, modules_to_save=[name])
        assert caught.value.remedy


def test_tied_head_trained_whole_leaves_the_tokens_to_the_embedding(tmp_path):
    plain, model = tiny.llama(), tiny.llama()
    graft = lora(model, IDS, modules_to_save=["lm_head"])
    assert graft.trainable_tokens["model.embed_tokens"].modules_using == ("model.embed_tokens",)
    other = dense(plain, graft)
    other.lm_head.weight.data = graft.saved_modules["lm_head"].weight.detach().double()
    close(logits(model), logits(other), 1e-5)
    write_merged(graft, tmp_path / "m")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model), 1e-5)


def test_encoder_with_a_classifier():
    model, other = tiny.bert_classifier(), tiny.bert_classifier()
    base = logits(model)
    graft = graftwork.attach(model, "lora", r=2, target_modules=["query"], trainable_tokens=IDS, modules_to_save=["classifier"])
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        rows = graft.trainable_tokens["bert.embeddings.word_embeddings"].rows
        rows += 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        other.get_input_embeddings().weight[IDS] = rows
    close(logits(model), logits(other), 1e-5)
    assert (logits(model) - base).abs().max() > 1e-3


def test_scaled_graft_takes_its_whole_modules_along(tmp_path):
    model = untied()
    graft = lora(model, [], modules_to_save=["lm_head"])
    graft.scale(0.5)
    wanted = logits(model)
    write_peft(graft, tmp_path / "p")
    write_lora(graft, tmp_path / "l")
    write_merged(graft, tmp_path / "m")
    for path in ("p", "l"):
        other = untied()
        graftwork.attach_saved(other, tmp_path / path)
        close(logits(other), wanted, 1e-5)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), wanted, 1e-5)


def test_fleet_of_heads_needs_no_copy_per_token():
    """Chunked loss: a row of the head's input is a token; a copy of the whole head for each would be 256 heads."""
    model = untied()
    grafts = {name: lora(model, [], name, seed, modules_to_save=["lm_head"]) for seed, name in enumerate("ab")}
    objective, batch = CausalLMObjective(CausalLM(chunk_tokens=8)), {"input_ids": TEXT, "labels": TEXT}
    with graftwork.routing(model, ["a", "b", "b", "a"]):
        objective.loss(model, batch).loss.backward()
    mixed = grafts["b"].saved_modules["lm_head"].weight.grad.clone()
    model.zero_grad()
    with graftwork.routing(model, ["b", "b"]):
        objective.loss(model, {k: v[1:3] for k, v in batch.items()}).loss.backward()
    close(mixed, grafts["b"].saved_modules["lm_head"].weight.grad, 1e-4)
