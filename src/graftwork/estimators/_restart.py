"""Forwards that restart from the input of a block: what lies before a changed weight need not be computed again.

A stack of L blocks is the model's list of layers. One forward is recorded: for each block, what it returned. A later forward
"from block k" runs the model's own code, in which the blocks before k give nothing but the record of block k - 1: the embedding,
masks and positions are computed again, the blocks k .. L - 1 and the head too, and the loss is identical to the last bit. k = L:
only what follows the stack.

Where it does not hold the stack is empty and every forward is whole: models whose blocks see more of each other than the next one's input
(found by comparing one restarted loss), routers and adapters that add terms to the loss (which are collected block by block).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling.blocks import block_list


class Stack:
    """The blocks of a model and the record of a forward over several micro-batches."""

    def __init__(self, model: nn.Module):
        self.blocks = block_list(model, least=2)
        self.records: dict[tuple[int, int], Any] = {}  # (micro-batch, block) -> its output
        self.depths = self._inside()

    def _inside(self) -> dict[int, int]:
        """{id of a parameter: the first block that holds it}."""
        found: dict[int, int] = {}
        for k, block in enumerate(self.blocks):
            for p in block.parameters():
                found.setdefault(id(p), k)
        return found

    @contextmanager
    def recording(self, model: nn.Module, micro: int) -> Iterator[None]:
        """A whole forward whose blocks are recorded. Parameters outside the blocks: those whose module is called for the first time after
        the last block restart behind it; all others need a whole forward."""
        handles, done = [], [0]
        early: set[int] = set()
        late: dict[int, int] = {}

        def keep(k: int):
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.records[micro, k], done[0] = output, k + 1
            return hook

        def seen(module: nn.Module, args: Any) -> None:
            for p in module.parameters(recurse=False):
                if done[0] == len(self.blocks):
                    late[id(p)] = done[0]
                else:
                    early.add(id(p))

        inside = {id(m) for block in self.blocks for m in block.modules()}
        try:
            for k, block in enumerate(self.blocks):
                handles.append(block.register_forward_hook(keep(k)))
            for module in model.modules():
                if self.blocks and id(module) not in inside and module._parameters:
                    handles.append(module.register_forward_pre_hook(seen))
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.depths = {**late, **self.depths, **dict.fromkeys(early, 0)}

    def depth(self, p: torch.Tensor) -> int:
        """The block from which a forward has to run when p changed."""
        return self.depths.get(id(p), 0)

    @contextmanager
    def restarted(self, micro: int, depth: int) -> Iterator[None]:
        """Forwards in this scope start at block `depth`. Nothing of a skipped block is called but its `forward`."""
        kept = [(block, block.__dict__.get("forward")) for block in self.blocks[:depth]]
        try:
            for block, _ in kept:
                block.forward = lambda *_, _out=self.records[micro, depth - 1], **__: _out
            yield
        finally:
            for block, own in kept:
                if own is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = own
