"""The ledger: live tensor bytes by category, counted while a program runs on real or on fake tensors.

`Ledger` is a TorchDispatchMode. It sees every operation that reaches the dispatcher, takes the untyped storages of
inputs and outputs, and keeps one weak reference per storage; when it dies, its bytes leave the total at once. So

    live(t) = sum of nbytes(s) over storages s alive at t,      peak = max over operations of live after the operation

where "after" still includes the inputs. Views, detached tensors, in-place results and tensors saved by autograd
share a storage and count once, for as long as anything (a name, a module, the graph) holds it. Nothing reads data,
pointers to data, or values: the same code counts FakeTensors byte for byte. Enter it *inside* FakeTensorMode:

    with FakeTensorMode(), Ledger(logits_width=vocab) as ledger:
        model = build();  ledger.track(model, "weights");  ledger.track(graft, "adapters")
        optimizer = build_optimizer();  ledger.track(optimizer)
        loss = step(model);  loss.backward();  optimizer.step()
    ledger.peak_bytes, ledger.peak_categories, ledger.timeline

Categories. What is tracked has the category it was given (a later call wins). What is created has, in this order: the
innermost `with ledger.category(...)`; `logits` if its last dimension is `logits_width` and it is floating point;
`other` inside an optimizer step (temporaries); else `activations` (this includes gradients of activations). A
parameter's gradient becomes `gradients` when autograd delivers it, optimizer state becomes `optimizer_state` when the
step ends, both also in the snapshots already taken: a storage alive now and born before a snapshot was in it.
A storage that is first met as an input (a batch, an untracked buffer) counts from there on, as `other`.
One correction. Any dispatch mode makes autograd's engine allocate a third tensor where two gradients meet and it would
otherwise add in place; `planning.accumulation` recognizes this, and the ledger counts what the run without it does.

Not seen: scratch memory that a kernel or library allocates and frees inside one operation (attention, oneDNN, cuBLAS
workspaces), storages of opaque layout (packed oneDNN weights), and memory outside tensors. These are *tensor bytes*;
`planning.measure.expected_device_bytes` says what a device needs beside them. Tensor subclasses that wrap other
tensors are unwrapped: their inner tensors count. A storage resized without an operation is noticed at its next use.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UsageError, nearest
from .accumulation import adds_in_place, last_reference
from .blocks import Block, Snapshot, device_of, tensors_in

CATEGORIES = ("weights", "adapters", "gradients", "optimizer_state", "activations", "logits", "kv", "other")
POOLS = ("small", "medium", "large")
_INDEX = {name: i for i, name in enumerate(CATEGORIES)}
_GRADIENTS, _STATE, _ACTIVATIONS, _LOGITS, _OTHER = (
    _INDEX[n] for n in ("gradients", "optimizer_state", "activations", "logits", "other"))
#: gradients and state never take over what is declared a model's own
_OWNED = (_INDEX["weights"], _INDEX["adapters"])
_MIB = 2**20


def _index(category: str) -> int:
    if category not in _INDEX:
        raise UsageError(f"unknown memory category {category!r}{nearest(category, CATEGORIES)}",
                         remedy=f"use one of: {', '.join(CATEGORIES)}")
    return _INDEX[category]


class Course:
    """What a stretch of operations did to the totals: how many they were, its highest moment and what it left, relative to its start."""

    def __init__(self, start: Snapshot):
        self.start, self.high, self.operations, self.left = start, start, 0, 0


class Ledger(TorchDispatchMode):
    """Counts live tensor bytes by category inside `with ledger:` (see the module docstring).

    logits_width: vocabulary size; new floating-point tensors of this last dimension are `logits`. None: only by name.
    device: count storages of this device type only ("cuda", "cpu"); None counts all.
    timeline_points: upper bound on the kept points; each is the highest moment of its stretch of operations.
    Attributes: live_bytes, live_categories, peak_bytes, peak_categories (alias categories), peak_phase, peak_pools,
    peak_blocks, events, timeline; to_dict(), to_json().
    """

    def __init__(self, *, logits_width: int | None = None, device: str | None = None, timeline_points: int = 256):
        super().__init__()
        if timeline_points < 2:
            raise UsageError(f"timeline_points is {timeline_points}, must be at least 2")
        self.logits_width, self.device, self.timeline_points = logits_width, device, timeline_points
        self.events = 0
        self.on_operation: Callable[[Any, tuple, dict[str, Any], Any], None] | None = None  # another mode would disturb the count
        self.live_bytes = 0
        self._blocks: dict[int, Block] = {}
        self._by_category = [0] * len(CATEGORIES)
        self._pools = [0, 0, 0]
        self._forced: list[int] = []
        self._phase: str | None = None
        self._stepping = 0
        self._graph_task = -1
        self._last_reference: tuple[int, int, int] | None = None
        self._modules: list[tuple[weakref.ref, int]] = []
        self._optimizers: list[weakref.ref] = []
        self._hooked: dict[int, int] = {}  # id of a parameter -> id of its hook; no weak reference, `.to()` refuses those
        self._handles: list = []
        self._inside = False
        self._points: list[Snapshot] = []
        self._stride = 1
        self._course: Course | None = None
        self._peak = self._snapshot()

    # ---- what exists, and what it is -------------------------------------------------------------------------

    def track(self, what: Any, category: str | None = None) -> None:
        """Declare what exists: a Module (parameters and buffers, default `weights`; also again at `refresh`), an
        Optimizer (its state, now and after every step; always `optimizer_state`), or tensors in nested lists, tuples,
        dicts or any iterable (`category` required). Storages already counted change category. Raises UsageError."""
        if isinstance(what, torch.optim.Optimizer):
            if category not in (None, "optimizer_state"):
                raise UsageError(f"an optimizer's tensors are 'optimizer_state', not {category!r}",
                                 remedy="leave the category out")
            if not any(reference() is what for reference in self._optimizers):
                self._optimizers.append(weakref.ref(what))
                if self._inside:
                    self._hook_optimizer(what)
            self._mark_state(what)
        elif isinstance(what, nn.Module):
            index = _index(category or "weights")
            self._modules.append((weakref.ref(what), index))
            self._mark_modules([(what, index)])
        else:
            if category is None:
                raise UsageError("tensors need a category", remedy=f"one of: {', '.join(CATEGORIES)}")
            index = _index(category)
            tree = what if isinstance(what, (Tensor, list, tuple, dict)) else list(what)
            for tensor in tensors_in(tree):
                self._mark(tensor, index)
        self._sample()

    def refresh(self) -> None:
        """Look again at tracked modules and optimizers: parameters replaced, added, or given a `.grad` by hand."""
        alive = [(module, index) for reference, index in self._modules if (module := reference()) is not None]
        self._mark_modules(alive)
        for reference in self._optimizers:
            if (optimizer := reference()) is not None:
                self._mark_state(optimizer)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Storages created inside are of this category (innermost wins)."""
        self._forced.append(_index(name))
        try:
            yield
        finally:
            self._forced.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the moments inside, for the timeline; otherwise forward, backward or optimizer by what runs."""
        previous, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = previous

    def _mark(self, tensor: Tensor, index: int) -> None:
        block = self._see(tensor, index)
        if block is not None and block.category != index:
            for snapshot in (self._peak, *reversed(self._points)):
                if snapshot.event >= block.born:
                    snapshot.bytes[block.category] -= block.nbytes
                    snapshot.bytes[index] += block.nbytes
                elif snapshot is not self._peak:
                    break  # points are in order: all others are older still
            self._by_category[block.category] -= block.nbytes
            self._by_category[index] += block.nbytes
            block.category = index

    def _mark_unowned(self, tree: Any, index: int) -> None:
        for tensor in tensors_in(tree):
            block = self._see(tensor, index)
            if block is not None and block.category not in _OWNED:
                self._mark(tensor, index)

    def _mark_modules(self, modules: Sequence[tuple[nn.Module, int]]) -> None:
        # What several modules hold is of the last one's category: marked once, as a change goes through all points of a trace.
        wanted = {id(tensor): (tensor, index) for module, index in modules
                  for tensor in tensors_in([*module.parameters(), *module.buffers()])}
        for tensor, index in wanted.values():
            self._mark(tensor, index)
        for module, _ in modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._mark_unowned(parameter.grad, _GRADIENTS)

    def _mark_state(self, optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            self._mark_unowned(state, _STATE)

    def _hook_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        ledger = weakref.proxy(self)

        def before(optimizer, args, kwargs):
            ledger._stepping += 1

        def after(optimizer, args, kwargs):
            ledger._stepping -= 1
            ledger._mark_state(optimizer)

        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _hook_gradients(self) -> None:
        """Runs as each backward starts, so that parameters unfrozen between steps are found. Both hooks are needed:
        the first marks before an update that runs inside backward, the second marks a copy made by accumulation."""
        ledger = weakref.proxy(self)

        def arriving(gradient: Tensor) -> None:
            ledger._mark_unowned(gradient, _GRADIENTS)

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:
                ledger._mark_unowned(parameter.grad, _GRADIENTS)

        for reference, _ in self._modules:
            module = reference()
            for parameter in module.parameters() if module is not None else ():
                hooks = parameter._post_accumulate_grad_hooks
                if not parameter.requires_grad or not parameter.is_leaf or (
                        hooks and self._hooked.get(id(parameter)) in hooks):
                    continue
                handle = parameter.register_post_accumulate_grad_hook(accumulated)
                self._hooked[id(parameter)] = handle.id
                self._handles += [handle, parameter.register_hook(arriving)]

    # ---- counting --------------------------------------------------------------------------------------------
    # Totals change by `list[i] += int`, which neither a finalizer nor another thread can split under the interpreter
    # lock; so deaths reported in the middle of an operation need no lock.

    def _count(self, block: Block, sign: int) -> None:
        nbytes = block.nbytes
        self.live_bytes += sign * nbytes
        self._by_category[block.category] += sign * nbytes
        rounded = -(-nbytes // 512) * 512
        self._pools[0 if rounded <= _MIB else 1 if rounded < 10 * _MIB else 2] += sign * (
            rounded if rounded < 10 * _MIB else -(-nbytes // (2 * _MIB)) * 2 * _MIB)

    def _died(self, block: Block) -> None:
        if self._blocks.get(block.key) is block:
            del self._blocks[block.key]
            self._count(block, -1)

    def _see(self, tensor: Tensor, category: int) -> Block | None:
        """The block of a tensor's storage; counted under `category` if it was unknown, corrected if it was resized."""
        if self.device is not None and device_of(tensor).type != self.device:
            return None
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # opaque layouts have none
            return None
        key, nbytes = storage._cdata, storage.nbytes()
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(storage, self._died, key, nbytes, category, self.events)
            self._count(block, +1)
        elif block.nbytes != nbytes:
            self._count(block, -1)
            block.nbytes, block.born = nbytes, self.events
            self._count(block, +1)
        return block

    def _category_of_new(self, tensor: Tensor) -> int:
        if self._forced:
            return self._forced[-1]
        if self.logits_width is not None and tensor.is_floating_point() and tensor.shape[-1:] == (self.logits_width,):
            return _LOGITS
        return _OTHER if self._stepping else _ACTIVATIONS

    @classmethod
    def _should_skip_dynamo(cls):
        # PyTorch would keep its compiler out by a wrapper around each of a plan's half million calls; nothing compiles here.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in types:
            if hasattr(kind, "__tensor_flatten__"):
                return NotImplemented  # the wrapper runs first; its inner operations come back here
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a FakeTensor asked for its device: not an operation of the program
            return device_of(args[0])
        task = torch._C._current_graph_task_id()
        if task != self._graph_task:
            self._graph_task = task
            if task != -1:
                self._hook_gradients()
        in_place = task != -1 and adds_in_place(func, args, self._last_reference)  # first: the loops below hold references
        self.events += 1
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, _OTHER)
        out = func(*args, **kwargs)
        if self.on_operation:
            self.on_operation(func, args, kwargs, out)
        if in_place:
            block = self._blocks.pop(args[0].untyped_storage()._cdata, None)
            if block is not None:
                self._count(block, -1)
        for tensor in tensors_in(out):
            self._see(tensor, self._category_of_new(tensor))
        self._sample()
        return out

    def __enter__(self):
        if self._last_reference is None:  # probed under the modes that are active now, before this one is
            self._last_reference = last_reference()
        self._inside, self._stepping, self._graph_task = True, 0, -1
        for reference in self._optimizers:
            if (optimizer := reference()) is not None:
                self._hook_optimizer(optimizer)
        self.refresh()
        self._sample()
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        self._inside = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self.refresh()
        return result

    # ---- stretches that come again -----------------------------------------------------------------------------

    @property
    def where(self) -> tuple:
        """What decides the category of new storages, beside their shapes."""
        return *self._forced, self._stepping > 0

    def known(self) -> set[int]:
        """Addresses of the storages that are counted now."""
        return set(self._blocks)

    @contextmanager
    def course(self) -> Iterator[Course]:
        """Note what happens inside, to be replayed."""
        self._course = course = Course(self._snapshot())
        try:
            yield course
        finally:
            self._course = None
            course.operations, course.left = self.events - course.start.event, self.live_bytes - course.start.total

    def replay(self, course: Course) -> None:
        """Go through a stretch once more, up to its highest moment, without its operations; what it leaves is not there yet, and the last
        of its operations is the one that will make it."""
        start, high = course.start, course.high
        self.events += course.operations - 1

        def since(now: list[int], then: list[int], before: list[int]) -> list[int]:
            return [n + b - a for n, b, a in zip(now, then, before)]

        def moment() -> Snapshot:  # each of its own: what is found out about a tensor later changes them one by one
            here = self._snapshot()
            return Snapshot(here.event, here.phase, here.total + high.total - start.total, since(here.bytes, high.bytes, start.bytes),
                            since(here.pools, high.pools, start.pools), here.blocks + high.blocks - start.blocks)

        if self.live_bytes + high.total - start.total > self._peak.total:
            self._peak = moment()
        self._keep(moment())

    # ---- peak and timeline -----------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        phase = self._phase or ("optimizer" if self._stepping else "backward" if self._graph_task != -1 else "forward")
        return Snapshot(self.events, phase, self.live_bytes, self._by_category, self._pools, len(self._blocks))

    def _sample(self) -> None:
        if self.live_bytes > self._peak.total:
            self._peak = self._snapshot()
        if self._course is not None and self.live_bytes > self._course.high.total:
            self._course.high = self._snapshot()
        points = self._points
        if not points or self.events // self._stride != points[-1].event // self._stride or self.live_bytes > points[-1].total:
            self._keep(self._snapshot())

    def _keep(self, moment: Snapshot) -> None:
        """A point, or in place of the last one where that is of the same stretch and no higher."""
        points = self._points
        if points and moment.event // self._stride == points[-1].event // self._stride:
            if moment.total > points[-1].total:
                points[-1] = moment
            return
        points.append(moment)
        while len(points) > self.timeline_points:  # longer stretches; each keeps its highest moment
            self._stride *= 2
            stretches: dict[int, Snapshot] = {}
            for point in points:
                kept = stretches.get(point.event // self._stride)
                if kept is None or point.total > kept.total:
                    stretches[point.event // self._stride] = point
            self._points = points = list(stretches.values())

    def reset_peak(self) -> None:
        """Start the peak anew from what is alive now (a warm-up step before, say); the timeline goes on."""
        self._peak = self._snapshot()

    live_categories = property(lambda self: dict(zip(CATEGORIES, self._by_category)))
    peak_bytes = property(lambda self: self._peak.total)
    peak_phase = property(lambda self: self._peak.phase)
    peak_blocks = property(lambda self: self._peak.blocks, doc="Storages alive at the peak.")

    peak_categories = categories = property(lambda self: dict(zip(CATEGORIES, self._peak.bytes)),
                                            doc="Bytes by category at the peak; their sum is `peak_bytes`.")

    @property
    def peak_pools(self) -> dict[str, int]:
        """Bytes at the peak, rounded as CUDA's allocator rounds: blocks up to 1 MiB, below 10 MiB, and larger ones."""
        return dict(zip(POOLS, self._peak.pools))

    @property
    def points(self) -> list[Snapshot]:
        """The kept points, in order."""
        return self._points

    @property
    def timeline(self) -> list[tuple[int, str, dict[str, int]]]:
        """(operation number, phase, bytes by category), in order, at most `timeline_points`, the peak among them."""
        return [(p.event, p.phase, dict(zip(CATEGORIES, p.bytes))) for p in self._points]

    def to_dict(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak_bytes, "categories": self.peak_categories, "peak_phase": self.peak_phase,
                "peak_blocks": self.peak_blocks, "peak_pools": self.peak_pools, "live_bytes": self.live_bytes, "operations": self.events,
                "timeline": [{"operation": e, "phase": p, "bytes": b} for e, p, b in self.timeline]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())
