"""The repeated blocks of a model."""

from __future__ import annotations

from torch import nn


def block_list(model: nn.Module, least: int = 1) -> list[nn.Module]:
    """The largest ModuleList (by parameters) of at least so many blocks of one class; [] where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) >= least and len({type(b) for b in m}) == 1]
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[]))
