"""Attention over a pool of pages, as an attention function that Transformers' decoders call unmodified.

A step of the engine is one packed row (1, T): the new tokens of all requests, one segment after the other, prompts (or pieces
of them) and single tokens alike. Every decoder layer hands its queries, keys and values to `paged_attention`, which writes the
new keys and values into the request's cells and attends to all of its cells, and to nobody else's:

    new cells  K_l[c] = k_t, V_l[c] = v_t      o_t = softmax(q_t K_l[cells of the request up to t]^T * scaling) V_l[...]

A request whose cells lie in one piece is read in place; others are gathered. Queries that share a key/value head stand as
rows of one product, so grouped queries repeat nothing. What a segment needs in every layer (views of its cells, its mask) is made
once a step: a decode step is many small products, and what stands around each of them costs as much as the product.

Virtual tokens of an adapter stand before the text in cells of their own; where the adapter sets their keys and values
(`Given`), these go into the pool and not what the model made of the placeholders. A forward without a pool, as an adapter runs
it on the bare decoder to make a prefix from a prompt, is causal attention without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...errors import IncompatibleError
from ...modeling.state import state_of
from .pool import LayerShape, Pool

NAME = "graftwork_paged"


@dataclass
class Segment:
    """New tokens start .. stop of the packed row that belong to one request; cells: of all its tokens up to the last new one,
    a slice where they lie in one piece, else int64."""

    start: int
    stop: int
    cells: slice | Tensor
    masks: dict[tuple, Tensor] = field(default_factory=dict)
    seen: dict[int | None, list[Tensor]] = field(default_factory=dict)

    @property
    def new(self) -> int:
        return self.stop - self.start

    @property
    def length(self) -> int:
        return self.cells.stop - self.cells.start if isinstance(self.cells, slice) else self.cells.numel()

    def read(self, window: int | None, pool: Pool, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, G, cells, D) of one layer that its new tokens may see: views where the cells lie in one piece."""
        shown = window if self.new == 1 and window is not None and window < self.length else None
        cells = self.cells
        if shown is not None:
            cells = slice(cells.stop - shown, cells.stop) if isinstance(cells, slice) else cells[-shown:]
        if not isinstance(cells, slice):
            k, v = (lane.index_select(0, cells).transpose(0, 1).unsqueeze(0) for lane in (pool.keys[layer], pool.values[layer]))
            return k, v
        views = self.seen.get(shown)
        if views is None:
            views = self.seen[shown] = pool.views(cells)
        return views[2 * layer], views[2 * layer + 1]

    def mask(self, window: int | None, heads: int, device: torch.device) -> Tensor | None:
        """(heads * new, length) bool, what each new token may see of what `read` gives; None: everything. Made once for all layers."""
        if self.new == 1:
            return None
        if (window, heads) not in self.masks:
            place = torch.arange(self.length, device=device)
            own = place[-self.new:, None]
            seen = place <= own
            if window is not None:
                seen &= place > own - window
            self.masks[window, heads] = seen.repeat(heads, 1) if heads > 1 else seen
        return self.masks[window, heads]


@dataclass
class Given:
    """Keys and values table (layers, 2, n, heads * width) that n cells (int64) hold whatever the model computes for them."""

    cells: Tensor
    table: Tensor


@dataclass
class Packed:
    """One step: the pool, the cells of the T new tokens (int64), the segments in the order of the row, and what is given."""

    pool: Pool
    new_cells: Tensor
    segments: Sequence[Segment]
    given: Sequence[Given] = ()


def cells_of(pages: Sequence[int], length: int, page_tokens: int, device: torch.device | str = "cpu") -> slice | Tensor:
    """The cells of a request's first `length` tokens: a slice where its pages are neighbours."""
    needed = -(-length // page_tokens)
    first = pages[0]
    if all(page == first + i for i, page in enumerate(pages[:needed])):
        return slice(first * page_tokens, first * page_tokens + length)
    table = torch.tensor(pages[:needed], device=device)
    return (table[:, None] * page_tokens + torch.arange(page_tokens, device=device)).flatten()[:length]


def paged_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                    packed: Packed | None = None, scaling: float | None = None, sliding_window: int | None = None,
                    softcap: float | None = None, s_aux: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """query (1, H, T, D), key (1, G, T, D), value (1, G, T, E) -> ((1, T, H, E), None). softcap: c tanh(scores / c); s_aux (H,): a
    logit per head that takes part in the softmax and has no value."""
    if packed is None:
        whole = [Segment(0, query.shape[2], slice(0, key.shape[2]))]
        rows = [_attend(q, lambda _, own=(k.unsqueeze(0), v.unsqueeze(0)): own, whole, k.shape[0], scaling, sliding_window, softcap, s_aux)
                for q, k, v in zip(query, key, value)]
        return torch.stack(rows), None
    layer, pool = module.layer_idx, packed.pool
    lanes = pool.keys[layer], pool.values[layer]
    for which, (lane, new) in enumerate(zip(lanes, (key, value))):
        lane.index_copy_(0, packed.new_cells, new[0].transpose(0, 1).to(lane.dtype))
        for given in packed.given:
            own = given.table[layer, which].to(lane.dtype, copy=True)  # it may itself lie in the pool, and a copy onto itself is refused
            lane.index_copy_(0, given.cells, own.view(-1, *lane.shape[1:]))
    return _attend(query[0], lambda segment: segment.read(sliding_window, pool, layer), packed.segments, key.shape[1], scaling,
                   sliding_window, softcap, s_aux).unsqueeze(0), None


def _attend(query: Tensor, read: Callable[[Segment], tuple[Tensor, Tensor]], segments: Sequence[Segment], groups: int,
            scaling: float | None, sliding_window: int | None, softcap: float | None, s_aux: Tensor | None) -> Tensor:
    """query (H, T, D); read(segment): keys (1, G, cells, D) and values (1, G, cells, E), G = groups -> (T, H, E)."""
    heads, share = query.shape[0], query.shape[0] // groups
    singles = next((i for i, segment in enumerate(segments) if segment.new > 1), len(segments))  # they come first in most steps
    # (1, G, share * new, D): the queries of a group are rows of one product with its keys
    asked = list(query[:, :singles].transpose(0, 1).reshape(singles, 1, groups, share, -1).unbind(0)) if singles else []
    asked += [query[:, s.start: s.stop].reshape(1, groups, share * s.new, -1) for s in segments[singles:]]
    found = []
    for segment, q in zip(segments, asked):
        mask, (k, v) = segment.mask(sliding_window, share, query.device), read(segment)
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        if softcap is None and s_aux is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        else:
            sinks = None if s_aux is None else s_aux.view(groups, share, 1).expand(-1, -1, segment.new).reshape(1, groups, -1, 1)
            y = _explicit(q, k, v, mask, scaling, softcap, sinks)
        found.append(y)
    out = [y.view(heads, s.new, -1).transpose(0, 1) for s, y in zip(segments[singles:], found[singles:])]
    if singles:
        out.insert(0, torch.cat(found[:singles]).view(singles, heads, -1))
    return torch.cat(out) if len(out) > 1 else out[0]


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None,
              sinks: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return shares[..., : k.shape[-2]] @ v


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """Heads and widths of every layer's keys and values, seen by running one token through the model.

    Raises IncompatibleError for models whose layers keep something else than keys and values of softmax attention."""
    found: dict[int, LayerShape] = {}

    def look(module, query, key, value, attention_mask, **kwargs):
        found[module.layer_idx] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    config = model.config.get_text_config(decoder=True)
    layers, name = getattr(config, "num_hidden_layers", None), type(model).__name__
    AttentionInterface.register(f"{NAME}_look", look)
    AttentionMaskInterface.register(f"{NAME}_look", lambda *args, **kwargs: None)
    try:
        with attention_of(model, f"{NAME}_look"), state_of(model).scope(rows=(None,)), torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
            model(input_ids=token, position_ids=token, use_cache=False)
    except (ValueError, KeyError, AttributeError) as error:
        raise IncompatibleError(f"{name} does not call Transformers' attention interface ({error})",
                                remedy="serve a decoder whose layers are softmax attention, or use graft generate") from None
    if layers is None or sorted(found) != list(range(layers)):
        kept = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
        other = sorted({str(kind) for kind in kept if "attention" not in str(kind)}) if kept else []
        raise IncompatibleError(f"{name} has {layers} layers, of which {len(found)} keep keys and values"
                                + (f"; the others are {', '.join(other)}" if other else ""),
                                remedy="layers with recurrent state are not served yet; use graft generate for this model")
    return [found[i] for i in range(layers)]


class attention_of:
    """Scope in which the model uses an attention function by name."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *error) -> None:
        self.model.set_attn_implementation(self.before)
