"""Objectives against Transformers' own losses, autograd and closed forms."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from graftwork.errors import IncompatibleError, UsageError
from graftwork.objectives import _head, base
from graftwork.objectives.causal_lm import CausalLM, CausalLMObjective
from graftwork.objectives.classification import Classification, ClassificationObjective
from graftwork.registry import lookup

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "qwen3": tiny.qwen3}


def objective(**options):
    return CausalLMObjective(CausalLM(**options))


def batch_of(rows=3, width=11, trained=0.5, seed=0, targets=True):
    """Right-padded rows of different length, a share of the tokens trained (all: 1.0)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for r in range(1, rows):
        mask[r, width - r:] = 0
    keep = (torch.rand(ids.shape, generator=generator) < trained) & mask.bool()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(keep, ids, -100)}
    return with_targets(batch) if targets else batch


def with_targets(batch):
    row, t = torch.where(batch["labels"][:, 1:] != -100)
    width = batch["input_ids"].shape[1]
    counts = torch.bincount(row, minlength=len(batch["input_ids"]))
    return {**batch, "target_index": row * width + t, "target_ids": batch["labels"][row, t + 1], "row_tokens": counts,
            "n_targets": len(row)}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys() and theirs
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()), msg=name)


def token_terms(model, batch, smoothing=0.0):
    """(N, T) term of each next token by torch alone; zero where untrained."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    logits = model(**inputs, use_cache=False).logits.float()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("trained", [0.4, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name, trained):
    model, batch = MODELS[name](), batch_of(trained=trained)
    out = objective(chunk_tokens=4).loss(model, batch, 1.0 / batch["n_targets"])
    out.loss.backward()
    ours = gradients(model)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model))
    assert out.row_tokens.tolist() == batch["row_tokens"].tolist()
    torch.testing.assert_close(out.row_loss.sum() / batch["n_targets"], theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_rows_equal_their_examples_apart(name):
    model = MODELS[name]()
    pieces = [batch_of(rows=1, width=w, trained=1.0, seed=w) for w in (5, 7)]
    ids = torch.cat([p["input_ids"] for p in pieces], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    segments = torch.tensor([[1] * 5 + [2] * 7])
    packed = {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "labels": ids.clone()}
    out = objective(chunk_tokens=3).loss(model, packed)
    out.loss.backward()
    ours = gradients(model)
    apart = sum(token_terms(model, p).sum() for p in pieces)
    apart.backward()
    assert out.row_tokens.tolist() == [10]
    torch.testing.assert_close(out.loss, apart, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, gradients(model))


def test_one_scale_per_row_is_manual_weighting():
    model, batch = tiny.llama(), batch_of()
    scale = torch.tensor([0.25, 2.0, 0.5])
    out = objective(chunk_tokens=4).loss(model, batch, scale)
    out.loss.backward()
    ours = gradients(model)
    rows = token_terms(model, batch).sum(1)
    (rows * scale).sum().backward()
    assert_same_gradients(ours, gradients(model))
    torch.testing.assert_close(out.row_loss, rows.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective().loss(model, batch, torch.tensor(0.5)).loss, rows.sum() * 0.5, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_to_the_large_batch():
    model, whole = tiny.llama(), batch_of(rows=4)
    total = objective().targets(whole)
    parts = [with_targets({k: whole[k][s] for k in ("input_ids", "attention_mask", "labels")})
             for s in (slice(0, 1), slice(1, 4))]
    for part in parts:
        objective().loss(model, part, 1 / total).loss.backward()
    added = gradients(model)
    objective().loss(model, whole, 1 / total).loss.backward()
    assert_same_gradients(added, gradients(model))


@pytest.mark.parametrize("head_trained", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_and_trained_heads(tied, head_trained):
    model, batch = tiny.llama(tied=tied), batch_of()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.lm_head.weight.requires_grad_(head_trained)
    objective(chunk_tokens=3).loss(model, batch).loss.backward()
    ours = gradients(model)
    token_terms(model, batch).sum().backward()
    theirs = gradients(model)
    assert len(theirs) == 1 + head_trained
    assert_same_gradients(ours, theirs)


def test_head_bias_is_used_and_trained():
    model, batch = tiny.llama(tied=False), batch_of()
    head = torch.nn.Linear(tiny.HIDDEN, tiny.VOCAB)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(torch.linspace(-1, 1, tiny.VOCAB))
    model.lm_head = head
    out = objective(chunk_tokens=3).loss(model, batch)
    out.loss.backward()
    ours = gradients(model)
    token_terms(model, batch).sum().backward()
    assert "lm_head.bias" in ours
    assert_same_gradients(ours, gradients(model))


@pytest.mark.parametrize("masked_head", [True, False])
def test_label_smoothing(masked_head):
    model, batch = tiny.llama(), batch_of()
    out = objective(chunk_tokens=4, label_smoothing=0.2, masked_head=masked_head).loss(model, batch)
    out.loss.backward()
    ours = gradients(model)
    theirs = token_terms(model, batch, smoothing=0.2).sum()
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, gradients(model))
    plain = token_terms(model, batch).sum()
    assert abs(float((plain - theirs).detach())) > 1e-2
    torch.testing.assert_close(objective(label_smoothing=0.2).evaluate(model, batch)["loss"].float(), plain, rtol=1e-5, atol=1e-5)


def test_targets_from_labels_alone():
    model, batch = tiny.llama(), batch_of(targets=False)
    full = with_targets(batch)
    assert objective().targets(batch) == full["n_targets"]
    assert objective().targets_by_row(batch) == objective().targets_by_row(full) == full["row_tokens"].tolist()
    assert objective().targets_by_row({**full, "row_counts": [4, 5, 6]}) == [4, 5, 6]  # the collator's list comes first
    torch.testing.assert_close(objective().loss(model, batch).loss, objective().loss(model, full).loss)
    with pytest.raises(UsageError, match="names no tokens"):
        objective().loss(model, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize("options", [{}, {"masked_head": False}])
def test_a_batch_without_targets_gives_a_zero_with_a_graph(options):
    model, batch = tiny.llama(), batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    out = objective(**options).loss(model, with_targets(batch))
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and out.row_tokens.tolist() == [0, 0, 0]
    assert all(float(g.abs().max()) == 0 for g in gradients(model).values())


@contextmanager
def largest(width, head):
    """Rows of the largest tensor with `width` last entries that an operation makes; views of the head do not count."""
    weight = head.weight.untyped_storage().data_ptr()

    class Watch(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (width,) and (
                        tensor.untyped_storage().data_ptr() != weight):
                    Watch.rows = max(Watch.rows, tensor.numel() // width)
            return out

    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("grafted", [False, True])
def test_logits_never_exceed_a_chunk(grafted):
    model, batch = tiny.llama(tied=False, vocab_size=331), batch_of(rows=4, width=30, trained=1.0)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    if grafted:
        model.lm_head.register_forward_hook(lambda *_: None)
    with largest(331, model.lm_head) as watch:
        objective(chunk_tokens=8).loss(model, batch).loss.backward()
    assert 0 < watch.rows <= 8
    with largest(331, model.lm_head) as watch:
        objective(chunk_tokens=8, masked_head=False).loss(model, batch).loss.backward()
    assert watch.rows == 4 * 30


class Odd(torch.nn.Linear):
    """A head that is no plain Linear."""


def test_a_foreign_head_module_is_called_in_chunks():
    plain, batch = tiny.llama(tied=False), batch_of()
    odd = copy.deepcopy(plain)
    odd.lm_head.__class__ = Odd
    calls = []
    odd.lm_head.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    a, b = (objective(chunk_tokens=4, label_smoothing=0.1).loss(m, batch, 0.1) for m in (plain, odd))
    assert calls and max(calls) <= 4 and sum(calls) == batch["n_targets"]
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.row_loss, b.row_loss, rtol=1e-5, atol=1e-6)
    a.loss.backward()
    b.loss.backward()
    assert_same_gradients(gradients(odd), gradients(plain))
    for key, value in objective().evaluate(plain, batch).items():
        torch.testing.assert_close(objective().evaluate(odd, batch)[key], value, rtol=1e-5, atol=1e-5)


def test_the_head_knows_the_row_of_each_token():
    """A head that adds something per batch row sees the rows through the forward state."""
    model, batch = tiny.llama(tied=False), batch_of()
    holder = model.__dict__["graft_state"] = _head.state_of(model)
    shift = torch.zeros(3, tiny.VOCAB, requires_grad=True)
    model.lm_head.register_forward_hook(lambda m, a, out: out + shift.index_select(0, holder.current.token_rows))
    objective(chunk_tokens=4).loss(model, batch).loss.backward()
    for r in range(3):
        one = with_targets({k: batch[k][r:r + 1] for k in ("input_ids", "attention_mask", "labels")})
        want = torch.zeros(1, tiny.VOCAB, requires_grad=True)
        F.cross_entropy((tiny.llama(tied=False)(one["input_ids"], attention_mask=one["attention_mask"]).logits.flatten(0, 1)
                         + want).index_select(0, one["target_index"]), one["target_ids"], reduction="sum").backward()
        torch.testing.assert_close(shift.grad[r], want.grad[0], rtol=1e-4, atol=1e-5)


def test_the_head_and_its_model_are_left_as_they_were():
    model, batch = tiny.llama(), batch_of()
    head = model.lm_head
    objective().loss(model, batch)
    assert model.lm_head is head and model.get_output_embeddings() is head
    with pytest.raises(IndexError):  # an id beyond the vocabulary fails inside the model
        objective().loss(model, {**batch, "input_ids": batch["input_ids"] + tiny.VOCAB})
    assert model.lm_head is head


def softcapped():
    from transformers import Gemma2Config

    config = Gemma2Config(vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.3, **tiny.SPECIAL)
    return tiny._build("AutoModelForCausalLM", config, 0)


def scaled(kind):
    import transformers

    more = {"Cohere": {"logit_scale": 0.4}, "Granite": {"logits_scaling": 3.0}}[kind]
    config = getattr(transformers, f"{kind}Config")(**{**tiny.llama_config().to_dict(), **more, "model_type": kind.lower()})
    return tiny._build("AutoModelForCausalLM", config, 0)


@pytest.mark.parametrize("grafted", [False, True])
@pytest.mark.parametrize("build", [softcapped, lambda: scaled("Cohere"), lambda: scaled("Granite")])
def test_models_that_bend_their_logits(build, grafted):
    model, batch = build(), batch_of()
    if grafted:
        model.lm_head.register_forward_hook(lambda *_: None)
    out = objective(chunk_tokens=4, label_smoothing=0.1).loss(model, batch)
    out.loss.backward()
    ours = gradients(model)
    theirs = token_terms(model, batch, smoothing=0.1).sum()
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, gradients(model))


def test_an_unknown_change_of_the_logits_is_refused():
    model, batch = tiny.llama(), batch_of()
    inner = model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = forward
    with pytest.raises(IncompatibleError, match="masked_head: false"):
        objective().loss(model, batch)
    out = objective(masked_head=False).loss(model, batch)
    torch.testing.assert_close(out.loss, token_terms(model, batch).sum(), rtol=1e-5, atol=1e-5)


def test_router_loss_of_a_mixture_of_experts():
    model, batch = tiny.mixtral(output_router_logits=True, router_aux_loss_coef=0.5), batch_of()
    out = objective(chunk_tokens=4).loss(model, batch, 1 / batch["n_targets"])
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(out.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.metrics["router_loss"], theirs.aux_loss.detach())
    quiet = objective().loss(tiny.mixtral(), batch, 1 / batch["n_targets"])
    assert not quiet.metrics and float((out.loss - quiet.loss).detach()) > 0.1


def test_evaluation_counts():
    model, batch = tiny.llama(), batch_of(rows=4, width=9, trained=0.3, seed=3)
    with torch.no_grad():
        best = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    width = batch["input_ids"].shape[1]
    target = batch["target_index"][0]  # make row of the first target all right
    batch["target_ids"] = torch.where(batch["target_index"] // width == target // width,
                                      best.flatten()[batch["target_index"]], batch["target_ids"])
    right = best.flatten()[batch["target_index"]] == batch["target_ids"]
    for options in ({}, {"masked_head": False}):
        sums = objective(chunk_tokens=2, **options).evaluate(model, batch)
        assert int(sums["tokens"]) == batch["n_targets"] and int(sums["correct"]) == int(right.sum())
        per_row = [right[batch["target_index"] // width == r] for r in range(4)]
        assert int(sums["rows"]) == sum(len(r) > 0 for r in per_row)
        assert int(sums["rows_correct"]) == sum(len(r) > 0 and bool(r.all()) for r in per_row) >= 1
        assert not sums["loss"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_near_the_fp32_gradient(dtype):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(32, 1000, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1000, 32, generator=generator) * 0.3)
    hidden = torch.randn(37, 32, generator=generator)
    targets, scale = torch.randint(0, 1000, (37,), generator=generator), torch.rand(37, generator=generator)

    def run(weight, h):
        h = h.clone().requires_grad_()
        weight = weight.clone().requires_grad_()
        call = _head._Call(_head.LogitRule(), 10, 0.0, False, weight.dtype, True)
        loss, _, _ = _head._ChunkedLoss.apply(h, weight, None, targets, scale, call)
        (2 * loss).backward()
        return loss.detach(), h.grad, weight.grad

    low = run(head.weight.detach().to(dtype), hidden.to(dtype))
    high = run(head.weight.detach().to(dtype).float(), hidden.to(dtype).float())
    assert low[1].dtype == low[2].dtype == dtype
    for ours, exact in zip(low, high):
        assert float((ours.float() - exact).norm() / exact.norm()) < 4e-3


def test_piecewise_widening_equals_one_product(monkeypatch):
    """The path of processors without 16-bit products, wherever the test runs."""
    monkeypatch.setitem(_head._PIECE, "cpu", 64 * 50)
    monkeypatch.setattr(_head, "product_dtype", lambda dtype, device: torch.float32)
    model, batch = tiny.llama(dtype=torch.bfloat16), batch_of()
    out = objective(chunk_tokens=4).loss(model, batch)
    out.loss.backward()
    ours = gradients(model)
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.flatten(0, 1)
    logits = hidden.index_select(0, batch["target_index"]).float() @ model.lm_head.weight.float().T
    theirs = F.cross_entropy(logits, batch["target_ids"], reduction="sum")
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, gradients(model), tolerance=2e-2)


def test_autocast_is_followed():
    model, batch = tiny.llama(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(chunk_tokens=4).loss(model, batch)
        theirs = token_terms(model, batch).sum()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, theirs, rtol=5e-3, atol=0)
    out.loss.backward()
    assert all(g.dtype == torch.float32 for g in gradients(model).values())


def test_gradient_checkpointing_and_no_grad():
    model, batch = tiny.llama(), batch_of()
    plain = objective().loss(model, batch)
    plain.loss.backward()
    want = gradients(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective().loss(model, batch).loss.backward()
    assert_same_gradients(gradients(model), want)
    with torch.no_grad():
        out = objective().loss(model, batch)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, plain.loss.detach())


def test_a_second_backward_is_an_error():
    out = objective().loss(tiny.llama(), batch_of())
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        out.loss.backward()


@pytest.mark.parametrize("grafted", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_fake_tensors(grafted, trained_head):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = batch_of()
    with FakeTensorMode() as mode:
        model = tiny.llama(tied=False, dtype=torch.bfloat16)
        model.lm_head.requires_grad_(trained_head)
        if grafted:
            model.lm_head.__class__ = Odd
        batch = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in real.items()}
        out = objective(chunk_tokens=4).loss(model, batch, 0.1)
        out.loss.backward()
        assert objective().targets(batch) == real["n_targets"]
        assert (model.lm_head.weight.grad is not None) == trained_head
        assert model.model.embed_tokens.weight.grad.dtype == torch.bfloat16 and out.row_loss.shape == (3,)


def test_logits_scope_surrounds_the_work_on_logits(monkeypatch):
    inside, made = [], []

    @contextmanager
    def scope():
        inside.append(1)
        yield
        inside.pop()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (331,):
                made.append(bool(inside))
            return out

    monkeypatch.setattr(base, "logits_scope", scope)
    model = tiny.llama(vocab_size=331).requires_grad_(False)
    with Watch():
        objective().loss(model, batch_of())
    assert made and all(made) and not inside


def test_models_without_a_head_are_refused():
    with pytest.raises(IncompatibleError, match="no causal language model"):
        objective().loss(tiny.bert_classifier(), batch_of())


# -- classification ---------------------------------------------------------------------------------------------------


def rows_with_labels(labels, seed=0):
    ids = torch.randint(3, tiny.VOCAB, (len(labels), 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels), "n_targets": len(labels), "n_tokens": 29}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes_of_rows(smoothing):
    model, batch = tiny.bert_classifier(), rows_with_labels([2, 0, 1, 1])
    method = ClassificationObjective(Classification(label_smoothing=smoothing))
    scale = torch.tensor([1.0, 0.5, 0.25, 2.0])
    out = method.loss(model, batch, scale)
    out.loss.backward()
    ours = gradients(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    soft = F.one_hot(batch["labels"], logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    rows = -(soft * logits.log_softmax(-1)).sum(-1)
    (rows * scale).sum().backward()
    torch.testing.assert_close(out.row_loss, rows.detach())
    assert_same_gradients(ours, gradients(model))
    assert out.row_tokens.tolist() == [1] * 4 and method.targets(batch) == 4
    sums = method.evaluate(model, batch)
    assert int(sums["correct"]) == int((logits.argmax(-1) == batch["labels"]).sum()) and int(sums["tokens"]) == 4
    torch.testing.assert_close(sums["loss"].float(), F.cross_entropy(logits, batch["labels"], reduction="sum").detach())


def test_classes_equal_the_models_own_loss_with_a_decoder():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny.llama_config(num_labels=3)).eval()
    batch = rows_with_labels([2, 0, 1])
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(ClassificationObjective().loss(model, batch, 1 / 3).loss, theirs)


def test_real_labels():
    model, batch = tiny.bert_classifier(num_labels=1), rows_with_labels([0.1, -2.0, 1.5])
    out = ClassificationObjective().loss(model, batch, 1 / 3)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(out.loss, theirs)
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert int(ClassificationObjective().evaluate(model, batch)["correct"]) == int(((scores - batch["labels"]).abs() < 0.5).sum())
    with pytest.raises(IncompatibleError, match="num_labels=1"):
        ClassificationObjective().loss(tiny.bert_classifier(), batch)


def test_label_words_of_a_causal_model_count_per_row():
    model, batch = tiny.llama(), batch_of()
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 8:10] = torch.tensor([7, 9])  # two words
    labels[2, 6] = 5  # one; the second row has none
    batch = with_targets({**batch, "labels": labels})
    method = ClassificationObjective(Classification(chunk_tokens=2))
    out = method.loss(model, batch, 1 / method.targets(batch))
    rows = token_terms(model, batch).sum(1)
    assert method.targets_by_row(batch) == out.row_tokens.tolist() == [1, 0, 1]
    torch.testing.assert_close(out.loss, (rows[0] + rows[2]) / 2, rtol=1e-5, atol=1e-5)
    sums = method.evaluate(model, batch)
    assert int(sums["tokens"]) == 2 and int(sums["correct"]) == 0
    best = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1).flatten()
    batch["target_ids"] = best[batch["target_index"]]
    assert int(method.evaluate(model, batch)["correct"]) == 2


def test_misplaced_labels_are_refused():
    with pytest.raises(IncompatibleError, match="no score head"):
        ClassificationObjective().loss(tiny.llama(), rows_with_labels([1, 0]))
    with pytest.raises(UsageError, match="one label per row"):
        ClassificationObjective().loss(tiny.bert_classifier(), {**rows_with_labels([1, 0]), "labels": torch.tensor([1, 0, 2])})


def test_registered():
    assert lookup("objective", "causal_lm").cls is CausalLMObjective
    assert lookup("objective", "classification").cls is ClassificationObjective
