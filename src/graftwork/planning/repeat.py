"""The plan of a model of many equal blocks, from the simulated steps of three shallow ones.

In a step of L equal blocks what is alive at a moment of block l is affine in l and in L: the weights of L blocks, what the forward
passes of l blocks keep, the gradients of L - l - 1 blocks, the state of those that are updated. So along the moments of one kind,

    kind = (forward pass, phase, operation, shapes)      x_n[i] = live bytes at its i-th moment in a model of n blocks

x_n[i] and x_n[-i] are affine in n for fixed i, what lies between them is affine in l and no larger than the larger end, and

    peak(L) = max over kinds and fixed i of   x_5[i] + (L - 5) (x_5[i] - x_4[i])

The same holds for the bytes of each category, parameters, operations and flops. Nothing is taken on trust: the blocks of the whole
model are compared module by module, and x_5 - x_4 = x_4 - x_3 is asked of the moment that wins, in every category. Where anything
differs there is no answer, and the caller simulates every block. Models of fewer than `LEAST` blocks gain nothing and are not tried;
nor are recipes that treat blocks differently (selections, chosen layers, estimators that move some of the weights, formats that are
allocated under a budget).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from torch import nn

from ..cache import file_stamp
from ..modeling.blocks import block_list
from ..recipe import Recipe
from ..registry import lookup
from .blocks import tensors_in

DEPTHS = (3, 4, 5)
LEAST = 16
#: how often operations of one kind may go through all blocks in one phase, and how many divisions into such runs are tried
MOST_RUNS, MOST_CUTS = 3, 1000
#: options of an adapter that tell layers apart
_CHOOSING = ("layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save")
Cells = Counter[tuple[str, int, int]]


@dataclass
class Trace:
    """A simulated step with what each of its operations was. points: of the ledger, one an operation."""

    points: Sequence[Any]
    kinds: dict[int, tuple]
    work: Any
    trained: int
    saved: int

    def moments(self) -> dict[tuple, list[Any]]:
        """{kind: its points in order}. A pass begins where a forward follows something else, and where tokens are embedded: estimators
        without a backward pass go forward several times in a row. Later lookups of other shapes are those of formats with code books."""
        found, number, last = defaultdict(list), 0, None
        tokens = next((kind for kind in self.kinds.values() if kind[:1] == ("aten.embedding.default",)), None)
        for point in self.points:
            kind = self.kinds.get(point.event, ())
            number += point.phase == "forward" and (last != "forward" or kind == tokens)
            last = point.phase
            found[number, point.phase, *kind].append(point)
        return found


@dataclass
class Grown:
    """Figures of the whole model, named as in a Plan; cells: of the micro-batches, update: of the optimizer."""

    peak: int
    categories: list[int]
    pools: list[int]
    blocks: int
    operations: int
    trained: int
    saved: int
    cells: Cells = field(default_factory=Counter)
    update: Cells = field(default_factory=Counter)


class Recorder:
    """Notes what each operation is: a callable for `Ledger.on_operation`, which goes on to `inner` once that is set."""

    def __init__(self, ledger: Any):
        self.ledger, self.kinds = ledger, {}
        self.inner: Callable[..., None] | None = None

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        self.kinds[self.ledger.events] = (str(func), tuple(tuple(t.shape) for t in tensors_in((args, kwargs, out))))
        if self.inner is not None:
            self.inner(func, args, kwargs, out)


def blocks_of(recipe: Recipe) -> int | None:
    """How many equal blocks the model has, where a step may be grown from shallow ones; else None."""
    from ..modeling.models import load_config
    from ..training.build import task_of

    layers = getattr(load_config(recipe.model).get_text_config(), "num_hidden_layers", 0)
    estimator, adapter = lookup("estimator", recipe.estimator.method).cls, recipe.adapter
    targets = getattr(adapter, "target_modules", None)
    named = [targets] if isinstance(targets, str) else targets or []
    if (layers < LEAST or recipe.is_fleet or recipe.adapter_from or recipe.selection or estimator.moves_some
            or lookup("storage", recipe.storage.method).cls.allocates
            or task_of(recipe) != "causal_lm" or any(getattr(adapter, name, None) for name in _CHOOSING)
            or any(c.isdigit() for name in named for c in name)):
        return None
    config = Path(recipe.model) / "config.json" if Path(recipe.model).is_dir() else Path(recipe.model)
    stamp = tuple(file_stamp(config)) if config.exists() else None
    return layers if _alike(recipe.model, stamp, recipe.trust_remote_code) == layers else None


@lru_cache(maxsize=8)
def _alike(model: str, stamp: Any, trust_remote_code: bool) -> int:
    """The number of the model's blocks, 0 where they are not equal. Kept, since a search asks for every plan."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..modeling.models import load_model

    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks = block_list(load_model(model, fake=True, trust_remote_code=trust_remote_code)[0])
    return len(blocks) if equal(blocks) else 0


def equal(blocks: Sequence[nn.Module]) -> bool:
    """Whether the blocks are alike: classes, shapes, dtypes and plain attributes of all their modules, but for their own numbers."""
    def described(block: nn.Module, number: int) -> list[Any]:
        return [(name, type(module), sorted((key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str))
                                            and not (type(value) is int and value == number and key.startswith("layer"))),
                 [(key, t.shape, t.dtype) for key, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))])
                for name, module in block.named_modules()]

    def plain(module: list[Any]) -> list[Any]:
        return [(name, kind, [(k, repr(v)) for k, v in values], tensors) for name, kind, values, tensors in module]

    first = plain(described(blocks[0], 0)) if blocks else None
    return all(plain(described(block, i)) == first for i, block in enumerate(blocks))


def grown(traces: Sequence[Trace], layers: int) -> Grown | None:
    """The figures of `layers` blocks from the traces of DEPTHS; None where they are not affine in the number of blocks."""
    def affine(a: int, b: int, c: int) -> int | None:
        return c + (layers - DEPTHS[-1]) * (c - b) if c - b == b - a else None

    def all_affine(*three: Sequence[int]) -> list[int] | None:
        found = [affine(*values) for values in zip(*three)]
        return None if None in found else found

    best = None
    for three in _aligned(traces):
        low, high = three[1].total - three[0].total, three[2].total - three[1].total
        total = three[2].total + (layers - DEPTHS[-1]) * max(low, high)
        if best is None or (total, -three[2].event) > (best[0], -best[1][2].event):  # of equals the first, as the ledger has it
            best = total, three
    if best is None:
        return None
    three = best[1]
    categories, pools = all_affine(*(p.bytes for p in three)), all_affine(*(p.pools for p in three))
    counts = all_affine(*((p.blocks, t.work.operations, t.trained, t.saved) for p, t in zip(three, traces)))
    cells, update = (_cells([getattr(t.work, name) for t in traces], layers) for name in ("cells", "update"))
    if categories is None or pools is None or counts is None or cells is None or update is None or sum(categories) != best[0]:
        return None
    return Grown(best[0], categories, pools, *counts, cells, update)


def _aligned(traces: Sequence[Trace]) -> list[tuple[Any, Any, Any]]:
    """The points of the three traces that are the same moment, by their place from the front or from the back of a kind. Kinds whose
    shapes grow with the model (norms of all gradients, stacked) go by operation alone. [] where a kind cannot be matched."""
    found = [trace.moments() for trace in traces]

    def regular(lists: Sequence[list[Any]]) -> bool:
        a, b, c = map(len, lists)
        return a > 0 and c - b == b - a >= 0

    kinds = dict.fromkeys(kind for moments in found for kind in moments)
    matched = [[m[kind] for m in found] for kind in kinds if regular([m.get(kind, []) for m in found])]
    rest: dict[tuple, list[list[Any]]] = {}
    for kind in kinds:
        if not regular([m.get(kind, []) for m in found]):
            for into, moments in zip(rest.setdefault(kind[:3], [[], [], []]), found):
                into.extend(moments.get(kind, []))
    for lists in rest.values():
        if not regular(lists):
            return []
        matched.append([sorted(points, key=lambda p: p.event) for points in lists])
    aligned = []
    for lists in matched:
        of_kind: list[tuple[Any, Any, Any]] = []
        for cuts in islice(_cuts(lists), MOST_CUTS):
            tried = _in_runs(lists, cuts)
            if tried and (not of_kind or _uneven(tried) < _uneven(of_kind)):
                of_kind = tried
            if of_kind and not _uneven(of_kind):
                break
        if not of_kind:
            return []
        aligned += of_kind
    return aligned


def _uneven(aligned: Sequence[tuple[Any, Any, Any]]) -> int:
    """How many of these moments are not affine in the number of blocks."""
    return sum(c.total - b.total != b.total - a.total for a, b, c in aligned)


def _cuts(lists: Sequence[list[Any]]) -> Iterator[tuple[int, ...]]:
    """Where the operations of one kind may begin with the first block again, in operations a block: a pass and a penalty after it go
    through the blocks one after the other. First uncut."""
    yield ()
    each = len(lists[1]) - len(lists[0])
    if all(len(points) == each * depth for points, depth in zip(lists, DEPTHS)):
        for runs in range(1, MOST_RUNS):
            yield from combinations(range(1, each), runs)


def _in_runs(lists: Sequence[list[Any]], cuts: tuple[int, ...]) -> list[tuple[Any, Any, Any]]:
    """The aligned points of one kind; [] where what lies between the ends of a run is larger than they are."""
    aligned: list[tuple[Any, Any, Any]] = []
    marks = [[0, *(cut * depth for cut in cuts), len(points)] for points, depth in zip(lists, DEPTHS)]
    for run in range(len(cuts) + 1):
        own = [points[at[run]:at[run + 1]] for points, at in zip(lists, marks)]
        front = (len(own[0]) + 1) // 2
        back = len(own[0]) - front
        deepest = own[-1]
        between, ends = deepest[front:len(deepest) - back], [*deepest[:front], *deepest[len(deepest) - back:]]
        if between and max(p.total for p in between) > max((p.total for p in ends), default=-1):
            return []
        aligned += zip(*(points[:front] for points in own))
        aligned += zip(*(points[len(points) - back:] for points in own))
    return aligned


def _cells(three: Sequence[Cells], layers: int) -> Cells | None:
    """Counts of equal operations, each affine. Those whose size grows with the model are few and small: as in the deepest trace,
    unless they have flops."""
    made: Cells = Counter()
    for cell in dict.fromkeys(cell for cells in three for cell in cells):
        a, b, c = (cells[cell] for cells in three)
        if a and c - b == b - a:
            made[cell] = c + (layers - DEPTHS[-1]) * (c - b)
        elif cell[1]:
            return None
        elif c:
            made[cell] = c
    return made


__all__ = ["DEPTHS", "Grown", "LEAST", "Recorder", "Trace", "blocks_of", "equal", "grown"]
