"""A model into a storage whose codes depend on data: block by block, each calibrated on what the quantised blocks before it give.

For block i and every batch b, with h_b the output of the quantised block i - 1:

    statistics of each linear map's inputs, from block i, still dense, on h_b;      every map into its storage;
    h_b <- quantised block i on h_b

A block is run inside the model: the model's own forward starts anew, blocks before i answer with the h_b that is kept, and the
forward stops behind block i. So each block gets the arguments that its model gives it (masks, rotary embeddings of its kind of
layer, biases of the first block), and only one hidden state per batch is kept. What runs before the blocks is run once more for
every block, which is little. Padding does not count. Maps with the same input share one set of statistics.

Where blocks are called in another order or several times, or read what another block left behind, statistics come from whole
forwards of the model as it is at that point, for all maps that are left. Maps outside the blocks come last, and see what the quantised
blocks give. Maps that no token reached (an expert that was never chosen) are rounded to the nearest. Whole forwards and such maps
are noted.

A calibration that trains windows of blocks (windows.py) is given the window that starts at block i before the maps of block i are
stored; where blocks cannot be run alone, it falls back to what it does for a single map.

before(i), after(i): called around block i, also where it is found stored already, so that a caller can load its weights and drop
them (compression.quantize); with windows, before(i) comes first for blocks that are further ahead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraftworkError, UsageError
from ...modeling.arithmetic import widen
from ...modeling.blocks import repeated_blocks
from ...modeling.experts import ATTRIBUTES, expert_map
from ...modeling.protocols import ExpertProduct
from ...registry import lookup
from ..base import Place, StorageConfig, places, store
from .statistics import InputStatistics, with_attributes
from .windows import Windows

#: bytes of second moments that are collected in one pass
STATISTICS_BYTES = 1 << 30
#: what a batch may hold beside a model's inputs
_OTHER = ("labels", "index", "rows", "n_targets", "real_tokens")


@torch.no_grad()
def walk(model: nn.Module, config: StorageConfig, batches: Any = None, *, on_site: Callable[[str], None] | None = None,
         before: Callable[[int], None] | None = None, after: Callable[[int], None] | None = None,
         notes: list[str] | None = None, prepared: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Put a model into a storage, in place. batches: model inputs, an iterable or a function that returns one; `real_tokens` (N, T)
    tells padding where `attention_mask` does not. prepared: what `Storage.prepare` gave (default: it is called).

    Raises UsageError where the storage needs data and there is none, or where activations are not finite. Names of the maps that
    were rounded to the nearest instead are kept at `model.graft_uncalibrated`."""
    cls = lookup("storage", config.method).cls
    needs, said = cls.needs(config), [] if notes is None else notes
    given = [dict(batch) for batch in (batches() if callable(batches) else batches or ())] if needs else []
    if needs and not given:
        kept = getattr(config, "calibration", {}).get("method", config.method)
        raise UsageError(f"storage '{config.method}' ({kept}) reads how the inputs of each layer are distributed; there is no such data",
                         remedy="give calibration data (`graft quantize --data FILE`, load(..., calibration_data=...), or a recipe "
                                "with data), or calibration: rtn")
    blocks, missed = repeated_blocks(model), []

    def put(found: list[Place], statistics: Mapping[str, InputStatistics]) -> None:
        found.reverse()
        while found:  # what is done is let go, with its dense weight
            place = found.pop()
            mine = statistics.get(place.name)
            if needs and (mine is None or not mine.count):
                missed.append(place.name)
                plain = cls.without_data(config)
                store(model, place, plain, with_attributes(white(place, cls.needs(plain)), extra.get(place.name)))
            else:
                store(model, place, config, with_attributes(mine, extra.get(place.name)))
            if on_site:
                on_site(place.name)

    def from_whole(index: int, error: Exception) -> dict[str, InputStatistics]:
        said.append(f"statistics come from whole forwards, since block {index} cannot be run alone ({error})")
        for other in range(len(blocks)) if before else ():
            before(other)
            widen(model)
        return _gather(places(model, config), needs, run.whole)

    widen(model)
    extra = prepared if prepared is not None else cls.prepare(model, config, given)
    run, all_of_them = Forwards(model, [block for _, block in blocks], given), None
    calibration, windows, collected = cls.windowed(config), None, needs

    def load(index: int) -> None:
        if before:
            before(index)
        widen(model.get_submodule(blocks[index][0]))

    if calibration is not None and blocks:
        dense = Forwards(model, run.blocks, given)
        windows, collected = Windows(model, run, dense, [name for name, _ in blocks], config, calibration, load), frozenset({"max_abs"})
    with evaluating(model):
        for index, (name, _) in enumerate(blocks):
            load(index)
            found, own = places(model, config, name), all_of_them or {}
            if needs and all_of_them is None:
                try:
                    own = _of_block(run, index, found, collected)
                    given_codes = windows.found(index) if windows else {}
                    own = {name: with_attributes(each, given_codes.get(name)) for name, each in own.items()}
                except _CannotWalk as error:
                    own = all_of_them = from_whole(index, error)
                    found = places(model, config, name)
            put(found, own)
            del own
            if needs and all_of_them is None and (index + 1 < len(blocks) or places(model, config)):
                try:
                    run.keep(index)
                except _CannotWalk as error:
                    all_of_them = from_whole(index, error)
            if after:
                after(index)
        outside = places(model, config)
        if outside and needs and all_of_them is None:
            try:
                all_of_them = _gather(outside, needs, run.around)
            except _CannotWalk as error:
                said.append(f"maps outside the blocks have no statistics ({error})")
        put(outside, all_of_them or {})
    if windows is not None and (text := windows.note()) is not None:
        said.append(text)
    if missed:
        shown = ", ".join(missed[:3]) + ", ..." * (len(missed) > 3)
        said.append(f"rounded to the nearest, since no calibration data reached them: {len(missed)} maps ({shown})")
    model.__dict__["graft_storage"], model.__dict__["graft_uncalibrated"] = config, missed
    if notes is None:
        for text in said:
            warnings.warn(text, stacklevel=3)


class _CannotWalk(Exception):
    """A block cannot be run alone; the text says why."""


class _Reached(Exception):
    """Raised behind a block, to leave the model's forward."""


class Forwards:
    """Forwards of a model over all batches that stop behind one block, those before it answering with what is kept."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Any]]):
        self.model, self.blocks, self.batches = model, blocks, [_inputs(batch) for batch in batches]
        self.masks = [batch.get("real_tokens", batch.get("attention_mask")) for batch in batches]
        self.trunk = getattr(model, "base_model", model)
        self.last: dict[int, list[Any]] = {}  # owner list -> output of its last block that ran, by batch
        self.owners = [next(i for i, m in enumerate(model.modules()) if isinstance(m, nn.ModuleList) and any(b is block for b in m))
                       for block in blocks]

    def whole(self, watch: Callable[[Tensor | None], None]) -> None:
        for batch, mask in zip(self.batches, self.masks):
            watch(mask)
            self.trunk(**batch)

    def around(self, watch: Callable[[Tensor | None], None]) -> None:
        """Forwards in which all blocks answer with what is kept: what lies outside them runs."""
        for number, batch in enumerate(self.batches):
            watch(self.masks[number])
            with _forwards({block: self._answer(i, number) for i, block in enumerate(self.blocks)}):
                self._run(batch)

    def alone(self, index: int, watch: Callable[[Tensor | None], None] | None = None) -> list[Any]:
        """The outputs of block `index`, by batch. watch(mask) is called before each. Raises _CannotWalk."""
        outputs = []
        for number in range(len(self.batches)):
            if watch:
                watch(self.masks[number])
            outputs.append(self.through(index, index, number))
        return outputs

    def keep(self, index: int) -> None:
        """Run block `index` as it is now, and go on from its outputs."""
        self.last[self.owners[index]] = self.alone(index)

    def through(self, first: int, last: int, number: int) -> Any:
        """The output of block `last` on a batch, where the blocks from `first` run on what is kept before it. Raises _CannotWalk."""
        found = []

        def stop(*args, **kwargs):
            found.append(real(*args, **kwargs))
            raise _Reached

        real = self.blocks[last].forward
        with _forwards({**{self.blocks[i]: self._answer(i, number) for i in range(first)}, self.blocks[last]: stop}):
            self._run(self.batches[number])
        return found[0] if found else None

    def _answer(self, index: int, number: int, called: list[int] | None = None) -> Callable:
        def forward(*args, **kwargs):
            if called is not None:
                called.append(index)
            return _copied(self.last[self.owners[index]][number])

        return forward

    def _run(self, batch: dict[str, Any]) -> None:
        try:
            self.trunk(**batch)
        except _Reached:
            pass
        except GraftworkError:
            raise
        except Exception as error:  # whatever a model's own code raises when a block before did not really run
            raise _CannotWalk(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}") from error

    def check_order(self, index: int, outputs: list[Any]) -> None:
        """Raises _CannotWalk where the blocks of the list of block `index`, its first, are not run once each, one after the other."""
        def stop(*args, **kwargs):
            raise _Reached

        called: list[int] = []
        mine = [i for i, owner in enumerate(self.owners) if owner == self.owners[index]]
        answers = {block: self._answer(i, 0, called) if i <= mine[-1] else stop for i, block in enumerate(self.blocks)}
        kept, self.last = self.last, {**self.last, self.owners[index]: outputs}
        try:
            with _forwards(answers):
                self._run(self.batches[0])
        finally:
            self.last = kept
        if [i for i in called if i in mine] != mine:
            raise _CannotWalk("the blocks are not run once each, one after the other")


@contextmanager
def _forwards(chosen: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Other forwards for some modules."""
    kept = {module: module.__dict__.get("forward") for module in chosen}
    for module, forward in chosen.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in kept.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _copied(output: Any) -> Any:
    """The tensors of an output anew, since a block may write into what it is given."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_copied(each) for each in output) if type(output) in (tuple, list) else output


def _of_block(run: Forwards, index: int, found: list[Place], needs: frozenset[str]) -> dict[str, InputStatistics]:
    """Statistics of the maps of block `index`. Raises _CannotWalk, and UsageError for activations that are not finite."""
    first = index == 0 or run.owners[index] != run.owners[index - 1]
    if not found and not first:
        return {}
    outputs: list[Any] = []

    def forward(watch):
        outputs[:] = run.alone(index, watch)

    statistics = _gather(found, needs, forward)
    if not outputs:
        forward(None)
    if first and outputs[0] is not None:
        run.check_order(index, outputs)
    for output in outputs:
        hidden = output if isinstance(output, Tensor) else output[0] if isinstance(output, (tuple, list)) else None
        if hidden is not None and not torch.isfinite(hidden).all():
            raise UsageError(f"block {index} gives NaN or infinite activations on the calibration data",
                             remedy="the model file is damaged, or its dtype too narrow: try dtype bf16 or fp32")
    return statistics


def _gather(found: list[Place], needs: frozenset[str], forward: Callable[[Callable], None]) -> dict[str, InputStatistics]:
    """{name: statistics of its inputs}, all at once."""
    return {place.name: known for place, known in statistics_of(found, needs, forward) if known is not None}


def statistics_of(found: list[Place], needs: frozenset[str],
                  forward: Callable[[Callable], None]) -> Iterator[tuple[Place, InputStatistics | None]]:
    """(place, statistics of its inputs or None) over the forwards that `forward(watch)` makes, in as many passes as memory asks for; those
    of one pass are alive at a time."""
    part: list[Place] = []
    size = 0
    for place in [*found, None]:
        bytes_of = place.product.in_features ** 2 * 4 if place is not None and "hessian" in needs else 0
        if part and (place is None or size + bytes_of > STATISTICS_BYTES):
            statistics = _pass(part, needs, forward)
            yield from ((each, statistics.get(each.name)) for each in part)
            del statistics
            part, size = [], 0
        if place is not None:
            part.append(place)
            size += bytes_of


def _pass(found: list[Place], needs: frozenset[str], forward: Callable[[Callable], None]) -> dict[str, InputStatistics]:
    statistics: dict[str, InputStatistics] = {}
    experts: dict[nn.Module, dict[tuple[str, int], str]] = {}
    leaders: dict[nn.Module, nn.Module] = {}
    current: dict[str, Any] = {"mask": None, "inputs": []}

    def fresh(place: Place) -> InputStatistics:
        return InputStatistics(place.product.in_features, needs, device=place.product.device)

    def watch(mask: Tensor | None) -> None:
        current["mask"], current["inputs"] = mask, []

    def plain(place: Place):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            if module not in leaders:  # q, k and v are given the same tensor
                leaders[module] = next((other for seen, other in current["inputs"] if seen is x), module)
                statistics[place.name] = fresh(place) if leaders[module] is module else statistics[named[leaders[module]]]
            current["inputs"].append((x, leaders[module]))
            if leaders[module] is module:
                statistics[place.name].add(x, _real(current["mask"], x))

        return hook

    def expert(module, args, kwargs):
        hidden, chosen = (*args, *(kwargs[k] for k in ("hidden_states", "top_k_index") if k in kwargs))[:2]
        rows = hidden.reshape(-1, hidden.shape[-1])
        real, mine = _real(current["mask"], rows), experts[module]
        for number in sorted({number for _, number in mine}):
            routed = (chosen == number).any(-1)
            x = rows[routed if real is None else routed & real.reshape(-1)]
            if not len(x):
                continue
            if (ATTRIBUTES[0], number) in mine:
                statistics[mine[ATTRIBUTES[0], number]].add(x)
            if (ATTRIBUTES[1], number) in mine:
                inner = module._apply_gate(expert_map(ExpertProduct(module, ATTRIBUTES[0], number), x))
                statistics[mine[ATTRIBUTES[1], number]].add(inner)

    named, handles = {place.module: place.name for place in found if place.expert is None}, []
    for place in found:
        if place.expert is None:
            handles.append(place.module.register_forward_pre_hook(plain(place), with_kwargs=True))
            continue
        statistics[place.name] = fresh(place)
        if place.module not in experts:
            handles.append(place.module.register_forward_pre_hook(expert, with_kwargs=True))
        experts.setdefault(place.module, {})[place.attribute, place.expert] = place.name
    try:
        forward(watch)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _real(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which rows of x (..., in) are tokens; None: all (also where x is of other tokens than the mask)."""
    return None if mask is None or mask.numel() * x.shape[-1] != x.numel() else mask.reshape(x.shape[:-1]).bool()


def white(place: Place, needs: frozenset[str]) -> InputStatistics | None:
    """Statistics of inputs of which nothing is known: all alike and independent."""
    if not needs:
        return None
    features = place.product.in_features
    made = InputStatistics(features, needs, device=place.product.device)
    made.add(torch.eye(features, device=place.product.device) * features ** 0.5)
    return made


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in _OTHER}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without a cache of keys and values."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    configs = [] if config is None else list({id(c): c for c in (config, config.get_text_config())}.values())
    kept = [(each, each.use_cache) for each in configs if hasattr(each, "use_cache")]
    model.eval()
    for each, _ in kept:
        each.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for each, value in kept:
            each.use_cache = value


__all__ = ["Forwards", "evaluating", "statistics_of", "walk", "white"]
