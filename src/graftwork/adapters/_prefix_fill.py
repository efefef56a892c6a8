"""Keys and values of virtual tokens in every layer, in place of those that the model computes for them.

The m virtual tokens are run as placeholders, and where an attention stores keys and values (after position encoding and norms),
theirs are replaced: a hook on each attention hands it a cache that does so. The replacement travels in the call's keywords,
so a layer that activation checkpointing repeats sees it again, with or without a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError

if TYPE_CHECKING:
    from .model_scope import Place, PrefixAdapter

FILL = "graft_prefix_fill"  # keyword of a forward, down to its attentions


def rooms(rows: list[PrefixAdapter | None], width: int, make: Callable[[PrefixAdapter, Tensor | None], Tensor],
           device: torch.device) -> Tensor:
    """(N, width, ...): what `make(adapter, its rows or None for all)` gives, (n, m, ...), at the right end of each row's room."""
    out = None
    for adapter in dict.fromkeys(a for a in rows if a is not None):
        own = [i for i, a in enumerate(rows) if a is adapter]
        index = None if len(own) == len(rows) else torch.tensor(own, device=device)
        made = make(adapter, index)
        made = nn.functional.pad(made, (*[0, 0] * (made.dim() - 2), width - adapter.length, 0))
        if index is None:
            return made
        out = made.new_zeros(len(rows), *made.shape[1:]) if out is None else out
        out = out.index_copy(0, index, made)
    return out


class Fill:
    """Keys and values of virtual tokens for one forward of the body: rows without such an adapter keep their own."""

    def __init__(self, rows: list[PrefixAdapter | None], tables: dict[PrefixAdapter, Tensor], width: int, place: Place):
        self.rows, self.tables, self.width = rows, tables, width
        self.layers = len(next(iter(tables.values())))
        self.seen: set[int] = set()
        self.whole = place.plain and len(tables) == 1 and all(a is not None for a in rows)
        if not self.whole:
            used = torch.tensor([a is not None for a in rows], device=place.device)[:, None]
            inside = used & (place.source >= place.empty) & (place.source < width)
            self.inside = inside[:, None, :, None]
            self.slot = place.source.clamp(max=width - 1)[:, :, None]

    @classmethod
    def of(cls, rows: list[PrefixAdapter | None], width: int, place: Place) -> Fill | None:
        """What replaces keys and values in this forward, or None."""
        found = {adapter: adapter.keys_values() for adapter in dict.fromkeys(a for a in rows if a is not None)}
        tables = {adapter: table for adapter, table in found.items() if table is not None}
        return cls([a if a in tables else None for a in rows], tables, width, place) if tables else None

    def put(self, states: Tensor, layer: int, which: int) -> Tensor:
        """states (N, heads, L, head size) of the lengthened rows, those of the virtual tokens replaced. which: 0 keys, 1 values."""
        n, heads, _, size = states.shape
        if any(table.shape[-1] != heads * size for table in self.tables.values()) or layer >= self.layers:
            raise IncompatibleError(f"layer {layer} keeps {heads * size} numbers a token, the prefix has others",
                                    remedy="choose adapter: prompt or lora")
        self.seen.add(layer)
        if self.whole:
            ((_, table),) = self.tables.items()
            own = table[layer, which].to(states).unflatten(-1, (heads, size)).transpose(0, 1)
            return torch.cat([own.expand(n, -1, -1, -1), states[:, :, self.width:]], 2)
        room = rooms(self.rows, self.width, lambda adapter, index: self.tables[adapter][layer, which].expand(
            n if index is None else index.shape[0], -1, -1), states.device).to(states)
        own = room.gather(1, self.slot.expand(-1, -1, room.shape[-1])).unflatten(-1, (heads, size)).transpose(1, 2)
        return torch.where(self.inside, own, states)

    def check(self, model: nn.Module) -> None:
        """Raises IncompatibleError when a layer computed its attention without the prefix."""
        if len(self.seen) != self.layers:
            raise IncompatibleError(f"{type(model).__name__} does not hand keys and values of every layer to a cache: "
                                    f"{len(self.seen)} of {self.layers} layers saw the prefix",
                                    remedy="choose adapter: prompt or lora")


class FillingCache:
    """The cache of one call of an attention (or none), with the keys and values of virtual tokens replaced on their way in."""

    def __init__(self, fill: Fill, inner: Any):
        self.fill, self.inner = fill, inner

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.fill.put(keys, layer_idx, 0), self.fill.put(values, layer_idx, 1)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def fill_attention(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    fill = kwargs.pop(FILL, None)
    if fill is not None:
        kwargs["past_key_values"] = FillingCache(fill, kwargs.get("past_key_values"))
    return args, kwargs
