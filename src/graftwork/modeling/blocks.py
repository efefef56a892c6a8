"""The repeated blocks of a model."""

from __future__ import annotations

from torch import nn


def block_list(model: nn.Module, least: int = 1) -> list[nn.Module]:
    """The largest ModuleList (by parameters) of at least so many blocks of one class; [] where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) >= least and len({type(b) for b in m}) == 1]
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=[]))


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of every outermost ModuleList of two or more entries, or of the only such lists there are: what a model runs
    one after the other, in the order it defines them. An encoder and a decoder are two lists; blocks may differ in kind."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    several = [each for each in found if len(each[1]) > 1]
    return [(f"{name}.{i}", block) for name, blocks in several or found for i, block in enumerate(blocks)]
