"""The output head of a causal model on chosen positions, in chunks: no (tokens, vocabulary) tensor ever exists.

For hidden states h_i (d), head W (V, d), bias b, targets y_i and scales s_i, with z_i = m * c * tanh((W h_i + b) / c)
(c: soft cap, absent: identity; m: a model's logit factor) and label smoothing e:

    term_i = -(1 - e) * log softmax(z_i)[y_i] - e / V * sum_v log softmax(z_i)[v],      loss = sum_i s_i term_i
    d term_i / d z_i = softmax(z_i) - (1 - e) * onehot(y_i) - e / V

Since the loss is a sum, its gradient at h, W and b is computed chunk by chunk in the forward, while the logits of the
chunk exist, and kept as (n, d) (and (V, d) if W is trained); the backward multiplies it by the incoming scalar. The
scale s is applied to the (n, d) side of each product, never to the logits. A pass over the logits is cut into tiles of a
few rows, which stay in the cache between the soft maximum and its use.

Processors without bf16 (or fp16) products run such matrix products element by element, up to forty times slower than in
fp32; there W is widened to fp32 a few thousand rows at a time, which costs no memory worth naming and rounds less.

Grafts that train rows of tokens (and nothing else at the head) move m of the logits, z_v += (R_v - W_v) h: m more columns of
the same products, with a gradient of their own. Any other head that is not a plain Linear (quantized, grafted, hooked) is called
as a module, chunk by chunk, under activation checkpointing: the same bound on memory for one more product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from ..errors import IncompatibleError
from ..modeling import repeated
from ..modeling.arithmetic import WideLinear, kind_of, pieces, product_dtype
from ..modeling.protocols import MovedRows
from ..modeling.state import state_of
from . import base
from .base import unwrap

#: elements of a tile of logits that one pass works on: a quarter of a cache on processors, few launches on accelerators
_TILE = {"cpu": 2**20}
#: elements of the piece of the head that is widened at once
_PIECE = {"cpu": 2**21}
_WIDE = 2**25


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the head's output: factor * cap * tanh(z / cap); cap None: no cap."""

    cap: float | None = None
    factor: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        z = z if self.cap is None else torch.tanh(z / self.cap) * self.cap
        return z if self.factor == 1.0 else z * self.factor

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """From a Transformers config (its text part)."""
        text = config.get_text_config()

        def value(name: str) -> float | None:
            found = getattr(text, name, None)
            return float(found) if isinstance(found, (int, float)) and found else None

        factor = (value("logit_scale") or 1.0) * (value("lm_head_multiplier") or 1.0) / (value("logits_scaling") or 1.0)
        return cls(value("final_logit_softcapping"), factor)


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits. Raises IncompatibleError for models that have none."""
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or getattr(inner.config, "is_encoder_decoder", False):
        raise IncompatibleError(f"{type(inner).__name__} is no causal language model: it has no output head over its own tokens",
                                remedy="choose a causal model, or objective: classification for a model with a score head")
    return head


class _Recorder(nn.Module):
    """Stands in for the head: keeps the hidden states it is given and answers with a few known numbers."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.__dict__["weight"] = getattr(head, "weight", None)  # for models that ask it for its dtype; no child of the recorder

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return hidden.new_tensor([[[-40.0, -1.0, 0.5, 25.0]]])


@contextmanager
def _recording(model: nn.Module, head: nn.Module) -> Iterator[_Recorder]:
    """The model with a recorder in place of its head. The model itself is called (not its body), so that wrappers, hooks,
    prefixes and router losses of the whole model take part."""
    inner = unwrap(model)
    path = next((name for name, module in inner.named_modules() if module is head), None)
    if not path:
        raise IncompatibleError(f"the output head of {type(inner).__name__} is not one of its modules",
                                remedy="set masked_head: false")
    parent, _, name = path.rpartition(".")
    owner, recorder = inner.get_submodule(parent), _Recorder(head)
    owner._modules[name] = recorder
    try:
        yield recorder
    finally:
        owner._modules[name] = head


def hidden_states(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """(hidden (N, T, d) as the head receives it, the model's output, what the model made of the recorder's numbers)."""
    head = output_head(model)
    with _recording(model, head) as recorder:
        output = model(**{"use_cache": False, **inputs})
    if len(recorder.seen) != 1 or recorder.seen[0].shape[:2] != inputs["input_ids"].shape:
        shapes = [tuple(seen.shape) for seen in recorder.seen]
        raise IncompatibleError(f"the output head of {type(unwrap(model)).__name__} was called with {shapes} for inputs of shape "
                                f"{tuple(inputs['input_ids'].shape)}", remedy="set masked_head: false")
    return recorder.seen[0], output, output.logits


def check_rule(model: nn.Module, rule: LogitRule, answer: Tensor) -> None:
    """Raises IncompatibleError when the model treats its logits in a way that `rule` does not describe. Reads values."""
    expected = rule(_Recorder()(answer.new_zeros(1, dtype=torch.float32)))
    if answer.shape != expected.shape or not torch.allclose(answer.float(), expected, rtol=2e-2, atol=1e-3):
        raise IncompatibleError(f"{type(unwrap(model)).__name__} changes its logits after the output head in an unknown way",
                                remedy="set masked_head: false")


def head_loss(model: nn.Module, hidden: Tensor, targets: Tensor, scale: Tensor, row: Tensor, *, rule: LogitRule,
              chunk: int, smoothing: float = 0.0, count: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss: scalar fp32, terms (n,) fp32 detached, correct (n,) bool detached; all False unless `count`).

    hidden (n, d): states of the trained positions; targets (n,) int64; scale (n,) fp32; row (n,) int64: batch rows."""
    head = output_head(model)
    plain, moved = _is_plain(head), None
    if not plain and _is_plain(head, grafted=True):
        with state_of(unwrap(model)).tokens(row):
            moved = head._modules["graft"].slot("whole").moved_rows()
    if plain or moved is not None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        call = _Call(rule, chunk, smoothing, count, dtype, torch.is_grad_enabled(), moved)
        return _ChunkedLoss.apply(hidden, head.weight, head.bias, targets, scale, call, None if moved is None else moved.change)
    return _module_loss(model, head, hidden, targets, scale, row, rule, chunk, smoothing, count)


def _is_plain(head: nn.Module, *, grafted: bool = False) -> bool:
    """Whether the head is nothing but W h + b; grafted: beside what grafts do there."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in head.__dict__
    kind = getattr(type(head), "plain_class", None) if grafted else type(head)
    plain = getattr(kind, "forward", None) in (nn.Linear.forward, WideLinear.forward)
    return plain and type(head.weight) in (nn.Parameter, FakeTensor) and not hooked  # a plan runs what the run will run


@dataclass(frozen=True)
class _Call:
    rule: LogitRule
    chunk: int
    smoothing: float
    count: bool
    dtype: torch.dtype
    grad: bool
    moved: MovedRows | None = None


class _ChunkedLoss(torch.autograd.Function):
    """The equations of this module's head. Differentiable once, in hidden, weight, bias and the change of moved rows."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor, call: _Call,
                change: Tensor | None = None):
        with torch.autocast(hidden.device.type, enabled=False):
            return _ChunkedLoss._run(ctx, hidden, weight, bias, targets, scale, call, change)

    @staticmethod
    def _run(ctx, hidden, weight, bias, targets, scale, call, change):
        (n, d), vocabulary = hidden.shape, weight.shape[0]
        wants = [call.grad and wanted for wanted in (*ctx.needs_input_grad[:3], change is not None and ctx.needs_input_grad[6])]
        dtype, size = product_dtype(call.dtype, hidden.device), _PIECE.get(kind_of(hidden.device), _WIDE)
        terms = torch.empty(n, dtype=torch.float32, device=hidden.device)
        correct = torch.zeros(n, dtype=torch.bool, device=hidden.device)
        factors = (scale * call.rule.factor).unsqueeze(1)
        # sums over chunks are kept in fp32: adding in bf16 would lose more than one large product does
        grads = [torch.empty_like(hidden) if wants[0] else None,
                 torch.zeros(vocabulary, d, dtype=torch.float32, device=hidden.device) if wants[1] else None,
                 torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if wants[2] else None,
                 torch.zeros(change.shape, dtype=torch.float32, device=hidden.device) if wants[3] else None]
        moved, D = call.moved, None if change is None else change.to(dtype)
        with base.logits_scope():
            logits = torch.empty(min(call.chunk, n), vocabulary, dtype=dtype, device=hidden.device)
            for start in repeated.each(range(0, n, call.chunk)):
                part = slice(start, min(start + call.chunk, n))
                z, h = logits[: part.stop - start], hidden[part].to(dtype)
                for rows, w in pieces(weight, dtype, size):
                    torch.mm(h, w.t(), out=z[:, rows])
                if bias is not None:
                    z += bias.to(dtype)
                used = None if moved is None or moved.used is None else moved.used[part]
                if moved is not None:
                    columns = h @ D.t()
                    z.index_add_(1, moved.ids, columns if used is None else columns * used)
                _to_gradient(z, targets[part], terms[part], correct[part], call, any(wants))
                if moved is not None and any(wants):
                    columns = z.index_select(1, moved.ids)
                    columns = columns if used is None else columns * used
                if grads[0] is not None:
                    product = None if moved is None else columns @ D
                    for rows, w in pieces(weight, dtype, size):
                        product = torch.mm(z[:, rows], w) if product is None else product.addmm_(z[:, rows], w)
                    grads[0][part] = product * factors[part]
                if grads[1] is not None:
                    scaled = (h * factors[part]).to(dtype)
                    if dtype == torch.float32:
                        grads[1].addmm_(z.t(), scaled)
                    else:
                        grads[1] += torch.mm(z.t(), scaled)
                if grads[2] is not None:
                    grads[2] += torch.mv(z.t(), factors[part, 0].to(dtype))
                if grads[3] is not None:
                    grads[3] += columns.t() @ (h * factors[part]).to(dtype)
        ctx.grads, ctx.dtypes = grads, tuple(None if t is None else t.dtype for t in (hidden, weight, bias, change))
        ctx.mark_non_differentiable(terms, correct)
        return (terms * scale).sum(), terms, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor):
        if ctx.grads is None:
            raise RuntimeError("the chunked loss keeps its gradient for one backward; call loss() again for another")
        grads, ctx.grads = ctx.grads, None
        *first, change = (None if g is None else g.mul_(grad_loss).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
        return (*first, None, None, None, change)


def _to_gradient(z: Tensor, targets: Tensor, terms: Tensor, correct: Tensor, call: _Call, grad: bool) -> None:
    """Fills terms (c,) and, if asked, correct (c,) from the head's output z (c, V); with `grad` overwrites z with
    d term / d z / factor."""
    rule, smoothing, vocabulary = call.rule, call.smoothing, z.shape[1]
    step = max(1, _TILE.get(kind_of(z.device), _WIDE) // vocabulary)
    for start in repeated.each(range(0, z.shape[0], step)):
        part = slice(start, start + step)
        tile, wanted = z[part], targets[part].unsqueeze(1)
        wide = tile.float()
        bent = None if rule.cap is None else torch.tanh(wide / rule.cap)
        if bent is not None:
            wide = bent * rule.cap
        logs = torch.log_softmax(wide if rule.factor == 1.0 else wide * rule.factor, -1)
        term = logs.gather(1, wanted).squeeze(1).neg_()
        if smoothing:
            term = (1 - smoothing) * term - smoothing * logs.mean(-1)
        terms[part] = term
        if call.count:
            correct[part] = logs.argmax(-1) == targets[part]
        if not grad:
            continue
        out = torch.exp(logs, out=tile if tile.dtype == logs.dtype else logs)
        if smoothing:
            out -= smoothing / vocabulary
        out.scatter_add_(1, wanted, out.new_full((1, 1), smoothing - 1.0).expand_as(wanted))
        if bent is not None:
            out *= 1 - bent * bent
        if out is not tile:
            tile.copy_(out)


def _module_loss(model, head, hidden, targets, scale, row, rule, chunk, smoothing, count):
    """The same through any head module, differentiable in everything the head uses."""
    holder = state_of(unwrap(model))
    seed = holder.current.seed

    def part_loss(h: Tensor, wanted: Tensor, rows: Tensor, start: int) -> Tensor:
        # another seed for each chunk, else a head's dropout would repeat its pattern in all of them
        with holder.tokens(rows), holder.scope(seed=seed + start), base.logits_scope():
            z = rule(head(h).float())
            term = F.cross_entropy(z, wanted, reduction="none", label_smoothing=smoothing)
            return torch.stack([term, (z.detach().argmax(-1) == wanted).to(term.dtype)]) if count else term[None]

    terms = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        arguments = (hidden[part], targets[part], row[part], start)
        if torch.is_grad_enabled():
            terms.append(checkpoint(part_loss, *arguments, use_reentrant=False, preserve_rng_state=False,
                                    context_fn=holder.checkpoint_contexts))
        else:
            terms.append(part_loss(*arguments))
    if not terms:  # no target: a zero that still hangs on the graph
        terms.append(hidden.float().sum(-1)[None])
    found = torch.cat(terms, 1)
    correct = found[1].detach() > 0 if count else torch.zeros_like(targets, dtype=torch.bool)
    return (found[0] * scale).sum(), found[0].detach(), correct
