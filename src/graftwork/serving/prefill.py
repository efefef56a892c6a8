"""What the prompts of a batch have in common is computed once: few-shot examples, instructions, system messages.

Prompts of one adapter that begin alike form a group; a group's prefix goes through the model as one row, and its keys and
values are then copied to every row of the group. A prompt without company is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..modeling.state import state_of
from .cache import RoomyLayer

#: a second pass over the model costs something itself: below this share of the padded tokens it is worth it
WORTH = 0.75


def shared_prefixes(prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[tuple[int, int]] | None:
    """(leader, length) of each prompt: its first `length` tokens are those of prompt number `leader`, under the same adapter.

    None where two passes (prefixes, then what is left of each prompt) would not save a quarter of the padded tokens."""
    found: list[tuple[int, int]] = [(i, 0) for i in range(len(prompts))]
    group: list[int] = []
    length = 0

    def close() -> None:
        for i in group:
            found[i] = (group[0], length)

    for i in sorted(range(len(prompts)), key=lambda i: (adapters[i] or "", tuple(prompts[i]))):
        room = len(prompts[i]) - 1  # the last token is every row's own: its logits choose the first new token
        if group and adapters[i] == adapters[group[0]]:
            common = min(_common(prompts[group[0]], prompts[i]), room)
            if 2 * common >= length > 0 and 4 * common >= room:  # else a short neighbour would cost the group its long prefix
                group.append(i)
                length = min(length, common)
                continue
        close()
        group, length = [i], room
    close()
    prefixes = {leader: length for leader, length in found}
    rest = max(len(prompt) - length for prompt, (_, length) in zip(prompts, found))
    tokens = len(prefixes) * max(prefixes.values(), default=0) + len(prompts) * rest
    return found if tokens < WORTH * len(prompts) * max(map(len, prompts)) else None


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def can_share(model: nn.Module, cache: DynamicCache) -> bool:
    """Whether keys and values of a prefix are those of the whole prompt: full attention, and no graft that reads or moves the prompt."""
    return (all(type(layer) is RoomyLayer for layer in cache.layers)
            and all(graft.info.traits["scope"] != "model" for graft in state_of(model).grafts.values()))


def padded(parts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) int64 with `pad` on the left, and their mask (N, T) int64, 0 at padding."""
    width = max(map(len, parts))
    ids = [[pad] * (width - len(part)) + list(part) for part in parts]
    mask = [[0] * (width - len(part)) + [1] * len(part) for part in parts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions_of(mask: Tensor) -> Tensor:
    """Position of each column (N, T) in its row, padding aside."""
    return (mask.cumsum(1) - 1).clamp(min=0)
