"""A key/value cache for decoding that writes into room reserved in advance.

Transformers' `DynamicLayer` concatenates at every step, so a step of 32 rows copies the whole cache once more. Here a
layer keeps a buffer (N, heads, room, head size) and hands out views of its filled part; it doubles when the room was
too small. Sliding-window, recurrent and other kinds of layers are left as Transformers makes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Full attention; `room` is the number of positions to reserve at the first update."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.key_buffer, self.value_buffer = room, None, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(N, heads, T, size) each, appended; returns everything kept so far, (N, heads, T_total, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self.key_buffer is None or stop > self.key_buffer.shape[-2]:
            self.room = max(self.room, stop if self.key_buffer is None else 2 * stop)
            self.key_buffer = self._longer(self.keys, key_states, start)
            self.value_buffer = self._longer(self.values, value_states, start)
        self.key_buffer[..., start:stop, :] = key_states
        self.value_buffer[..., start:stop, :] = value_states
        self._show(stop)
        return self.keys, self.values

    def _longer(self, kept: Tensor, new: Tensor, start: int) -> Tensor:
        buffer = new.new_empty(*new.shape[:-2], self.room, new.shape[-1])
        if start:
            buffer[..., :start, :] = kept
        return buffer

    def _show(self, stop: int) -> None:
        self.keys, self.values = self.key_buffer[..., :stop, :], self.value_buffer[..., :stop, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        if self.key_buffer is not None:
            stop = self.get_seq_length()
            self.key_buffer = self.key_buffer.index_select(0, indices)
            self.value_buffer = self.value_buffer.index_select(0, indices)
            self._show(stop)


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """An empty cache for a model of this config with room for `room` positions a row."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep these rows of the batch only, in this order; a row may be named several times."""
    for layer in cache.layers:
        # a recurrent layer can reorder rows but not select them, and one with attention beside it would select there only
        (layer.reorder_cache if hasattr(layer, "recurrent_states") else layer.batch_select_indices)(rows)


__all__ = ["RoomyLayer", "keep_rows", "roomy_cache"]
