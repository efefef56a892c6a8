"""Windows of adjacent blocks, whose weights are trained together on what the last of them gives.

With `window: (w, o)`, windows of w blocks start every w - o blocks, within one list of blocks, until one reaches its end. For each:

    inputs: what the quantised blocks before it give;   targets: what the dense blocks up to its last give on dense inputs;
    the maps of its blocks run with a differentiable weight (a student), and Adam with a cosine schedule trains these over the batches

    least over the students:   sum_k weight_k d_k(output, target) / d_k at the start   +   penalty

where every d_k (calibration.distances) counts in its own value under the codes of the start, so that they need no scale. The first w - o
blocks (the last window: all) are then stored; the others go on into the next window as they were trained. A window of which
the hard codes end no better than they began is put back. Padding does not count.

In memory: one window dense, its students with their gradients, and two hidden states a batch. Inputs are rounded where the
format rounds them (`activations:`), but for fused experts, whose students see them as they are.

A calibration gives: student(what the grid sees of a weight, quantizer, statistics of `student_needs`), an object with

    groups      parameter groups of Adam, each with `lr`
    dense(t)    (rows, columns), differentiable; t from 0 to 1 is the part of the steps that is done, and 1 stands for the codes themselves
    penalty(t)  a number, the sum over `size` entries
    found()     -> Calibrated
    channels    (2, in), only where its columns are of reassembled inputs (storage/_channels.py)

distances(output, target), both (tokens, features) fp32 -> (k,); weights (k,); and `window` and `steps` of its config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...modeling.protocols import is_conv1d
from ...registry import lookup
from .._activations import straight_through
from .._channels import reassembled, restored
from ..base import Place, StorageConfig, check_weight, places

if TYPE_CHECKING:
    from .walk import Forwards


class Windows:
    """run, dense: forwards of the model as it is quantised so far, and as it was. load(i) makes the dense weights of block i present."""

    def __init__(self, model: nn.Module, run: Forwards, dense: Forwards, names: list[str], config: StorageConfig, calibration: Any,
                 load: Callable[[int], None]):
        self.model, self.run, self.dense, self.names, self.load = model, run, dense, names, load
        self.config, self.calibration, self.cls = config, calibration, lookup("storage", config.method).cls
        self.students: dict[str, _Site] = {}
        self.errors: list[Tensor] = []  # of each window: before, with what was trained, with its codes
        self.ahead = 0  # blocks that the dense forwards are through

    def found(self, index: int) -> dict[str, dict[str, Any]]:
        """{map of block `index`: what its statistics are to carry}; called once a block, in order."""
        last = self._last(index)
        if last is not None:
            self._train(index, last)
        mine = [name for name in self.students if name.startswith(f"{self.names[index]}.")]
        return {name: {"found": self.students.pop(name).student.found()} for name in mine}

    def _last(self, index: int) -> int | None:
        """The last block of the window that starts at `index`; None if none does."""
        size, overlap = self.calibration.config.window
        mine = [i for i, owner in enumerate(self.run.owners) if owner == self.run.owners[index]]
        place, step = index - mine[0], size - overlap
        reached = place and place - step + size >= len(mine)  # by the window before
        return None if place % step or reached else min(index + size - 1, mine[-1])

    def _train(self, first: int, last: int) -> None:
        for index in range(self.ahead, last + 1):
            self.load(index)
            self._meet(index)
            self.dense.keep(index)
        self.ahead = max(self.ahead, last + 1)
        sites = [site for name, site in self.students.items() if any(name.startswith(f"{each}.") for each in self.names[first: last + 1])]
        if not sites:
            return
        targets, steps, batches = self.dense.last[self.dense.owners[last]], self.calibration.config.steps, len(self.run.batches)
        weights = torch.tensor(self.calibration.weights)
        count, groups = sum(site.student.size for site in sites), [group for site in sites for group in site.student.groups]
        trained = [p for group in groups for p in group["params"]]
        begun, before = [p.detach().clone() for p in trained], self._distances(first, last, sites, targets)
        unit = before.clamp(min=1e-30)
        with torch.enable_grad():
            optimizer = torch.optim.Adam([{**group, "full": group["lr"]} for group in groups])
            for step in range(steps):
                number, t = step % batches, step / steps
                with self._swapped(sites, t):
                    parts = self._parts(self.run.through(first, last, number), targets[number], number)
                    loss = (weights.to(parts) * parts / unit.to(parts)).sum() + sum(site.student.penalty(t) for site in sites) / count
                for p, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True)):
                    p.grad = grad  # None for an expert that the batch did not reach
                for group in optimizer.param_groups:
                    group["lr"] = group["full"] * (1 + math.cos(math.pi * t)) / 2
                optimizer.step()
        after = self._distances(first, last, sites, targets)
        if self.calibration.said_beside:
            soft = self._distances(first, last, sites, targets, 1 - 0.5 / steps)
            self.errors.append(torch.stack([before, soft, after])[:, 0])
        if not (weights * after / unit).sum() < (weights * before / unit).sum():
            for p, value in zip(trained, begun):
                p.data.copy_(value)

    def note(self) -> str | None:
        """What the trained changes lost when they became codes."""
        if not self.errors:
            return None
        before, trained, kept = (float(each) for each in torch.stack(self.errors).mean(0))
        return (f"mean squared error of the windows' outputs: {before:.4g} before the correction, {trained:.4g} with it beside the codes, "
                f"{kept:.4g} with it rounded into them (calibration.correction=inside trains the last)")

    def _meet(self, index: int) -> None:
        from .walk import statistics_of

        found, needs = places(self.model, self.config, self.names[index]), self.calibration.student_needs
        known = statistics_of(found, needs, lambda watch: self.dense.alone(index, watch)) if needs else ((place, None) for place in found)
        for place, statistics in known:
            weight = place.product.dense().detach()
            check_weight(weight, place.name)
            source, outer = self.cls.source(weight, self.config)
            quantizer = self.cls.quantizer(self.config, weight.shape[1])
            student = self.calibration.student(source, quantizer, statistics)
            self.students[place.name] = _Site(place, student, outer, weight.dtype, getattr(self.config, "activations", "none"))

    @torch.no_grad()
    def _distances(self, first: int, last: int, sites: list[_Site], targets: list[Any], t: float = 1.0) -> Tensor:
        """The mean over batches, with hard codes."""
        with self._swapped(sites, t):
            return torch.stack([self._parts(self.run.through(first, last, number), target, number).cpu()
                                for number, target in enumerate(targets)]).mean(0)

    def _parts(self, output: Any, target: Any, number: int) -> Tensor:
        output, target = (each if isinstance(each, Tensor) else each[0] for each in (output, target))
        mask, width = self.run.masks[number], output.shape[-1]
        found, wanted = output.reshape(-1, width).float(), target.reshape(-1, width).float()
        if mask is not None and mask.numel() == len(found):  # another number: the tokens of another part of the model
            real = mask.reshape(-1).bool()
            found, wanted = found[real], wanted[real]
        return self.calibration.distances(found, wanted)

    @contextmanager
    def _swapped(self, sites: list[_Site], t: float) -> Iterator[None]:
        """The weights of the students in the place of the dense ones, and inputs rounded as they will be."""
        made: dict[tuple[nn.Module, str], list[Tensor]] = {}
        handles = []
        for site in sites:
            made.setdefault((site.place.module, site.place.attribute or "weight"), []).append(site.dense(t))
            if site.rounds:
                handles.append(site.place.module.register_forward_pre_hook(site.round, with_kwargs=True))
        kept = {key: key[0]._parameters[key[1]] for key in made}
        try:
            for (module, name), weights in made.items():
                whole = torch.stack(weights) if kept[module, name].dim() == 3 else weights[0]
                whole = whole.mT if is_conv1d(module) or getattr(module, "is_transposed", False) else whole
                module._parameters[name] = whole  # not taken out: its place in the order would change
            yield
        finally:
            for (module, name), parameter in kept.items():
                module._parameters[name] = parameter
            for handle in handles:
                handle.remove()


class _Site:
    """One map, its student and the scale beside the grid."""

    def __init__(self, place: Place, student: Any, outer: Tensor | None, dtype: torch.dtype, kind: str):
        self.place, self.student, self.outer, self.dtype, self.kind = place, student, outer, dtype, kind
        self.rounds = place.expert is None and kind != "none"
        self.channels: Tensor | None = getattr(student, "channels", None)

    def dense(self, t: float) -> Tensor:
        dense = self.student.dense(t)[:, : self.place.product.in_features]
        if self.channels is not None and not self.rounds:
            dense = restored(dense, self.channels)
        return (dense if self.outer is None else dense * self.outer.float()).to(self.dtype)

    def round(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The map's inputs as they will be."""
        x = args[0] if args else kwargs["input"]
        x = straight_through(x if self.channels is None else reassembled(x, self.channels), self.kind)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


def checked_window(value: tuple[int, int]) -> tuple[int, int]:
    """The option `window`. Raises ValueError where windows would not move on."""
    if not 0 <= value[1] < value[0]:
        raise ValueError(f"window {list(value)}: the overlap is 0 or more, and less than the blocks; [2, 1]")
    return value
