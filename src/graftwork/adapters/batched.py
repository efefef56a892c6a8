"""Low-rank changes of rows that belong to different adapters: five kernels, and the measured choice between them.

    y_n = B_k A_k x_n,  k = index[n],   x (N, T, in), index (N,), A_k (r_k, in), B_k (out, r_k), y (N, T, out)

    stacked     all A's as one matrix (R, in), R the sum of the ranks, and all B's as one (R, out): two products for the whole batch; in
                between the values of other adapters are set to zero. K times the work, no gather, no loop.
    gathered    A and B of every row, (N, in, r) and (N, r, out), and two batched products. Ranks are padded to the largest; each
                row reads factors of its own, however many rows share them. One launch a product, no look at the index's values.
    grouped     rows put side by side by adapter, (K, m T, in), m the most rows that one has, and the same two batched products:
                each factor is read once and none is copied, ranks and groups are padded to the largest.
    segmented   rows sorted by adapter, two products an adapter at its own rank, rows put back.
    looped      the same without sorting: two products for each run of neighbors with one adapter.

A line of A that is a row of the identity (PaCA, S2FT) is kept as its position: the first product is then a selection of columns.
In the same way B may be positions of outputs. Which kernel is quickest depends on the shapes and on the machine:
`batched_table.json` holds times measured by benchmarks/batched.py, and `choose` takes the best of the nearest entry.

On a GPU with Triton (CUDA, ROCm) inference takes kernels of its own, which read every factor where it lies (`_triton.py`).

A row's output never depends on another row's adapter. `stacked` multiplies other adapters' B with zeros, so it is left out where
B has infinities or NaNs (a diverged adapter would reach its neighbors), and in training, where the same holds of gradients.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling.arithmetic import product_dtype
from ..modeling.protocols import has_values
from ._triton import add_in_place, takes_triton

#: where nothing was measured: one launch a product, and the host never waits for the index
DEFAULT = "gathered"
#: things that are kept with an index
KEPT = 64
TABLE = Path(__file__).with_name("batched_table.json")


class KeepsRows:
    """A bank that keeps what it made of the last index: a decode repeats it at every step."""

    def made_of(self, index: Tensor, make: Callable[[Any, Tensor], Any], keep: bool = True) -> Any:
        """make(bank, index), kept for the next calls with the very same index tensor; what depends on the ranks alone is kept with
        the index, for the banks of all sites."""
        if make in OF_RANKS:
            shared, key = index.__dict__.setdefault("made", {}), (make, self.ranks)
            if key not in shared:
                if len(shared) >= KEPT:  # an index lives as long as the rows stay in this order, whoever the adapters are
                    shared.clear()
                shared[key] = make(self, index)
            return shared[key]
        before = self.__dict__.get("_kept")
        if before is None or before[0] is not index:
            before = self._kept = (index, {})
        kept = before[1]
        if make in kept:
            return kept[make]
        made = make(self, index)
        if keep:
            kept[make] = made
        return made


@dataclass
class Bank(KeepsRows):
    """Adapters of one class at one site, one below the other: A (R, in) and B (R, out), R the sum of `ranks`. Either may be
    positions, int64 (R,): the columns of x that are read, the outputs that are added to. Where ranks differ one line of zeros
    follows, which `gathered` pads with."""

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    in_features: int
    out_features: int
    bias: Tensor | None = None  # (K, out)
    dropout: Tensor | None = None  # (K,), only while training
    key: str = ""

    def __post_init__(self) -> None:
        self.starts = tuple(accumulate(self.ranks, initial=0))  # the first line of each adapter, and where the last ends
        self._finite: bool | None = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], dtype: torch.dtype, *, bias: Tensor | None = None,
           dropout: Tensor | None = None, key: str = "") -> Bank:
        """From (B (out, r) or positions (r,), A (r, in) or positions (r,)) of each adapter, shape (out, in). Differentiable;
        kept in the dtype of the product, so that no step converts it again."""
        ranks = tuple(A.shape[0] for _, A in pairs)
        device = pairs[0][0].device
        dtype = product_dtype(dtype, device)

        def column(parts: list[Tensor], width: int) -> Tensor:
            positions = parts[0].dim() == 1
            if len(set(ranks)) > 1:
                parts.append(parts[0].new_zeros(1) if positions else parts[0].new_zeros(1, width))
            whole = torch.cat(parts)
            return whole.long() if positions else whole.to(dtype)

        return cls(column([A for _, A in pairs], shape[1]), column([B if B.dim() == 1 else B.T for B, _ in pairs], shape[0]), ranks,
                   shape[1], shape[0], None if bias is None else bias.to(dtype), dropout, key)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.A, self.B, self.bias) if t is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype if self.B.is_floating_point() else self.A.dtype

    @property
    def kind(self) -> str:
        """factors; columns, where A is positions; outputs, where B is."""
        return "columns" if self.A.dim() == 1 else "outputs" if self.B.dim() == 1 else "factors"

    @property
    def learns(self) -> bool:
        return self.A.requires_grad or self.B.requires_grad

    @property
    def finite(self) -> bool:
        """No infinity or NaN in B. Looked up once a bank."""
        if self._finite is None:
            self._finite = self.B.dim() == 1 or not has_values(self.B) or bool(torch.isfinite(self.B).all())
        return self._finite

    def bounds(self, k: int) -> slice:
        """The lines of adapter k."""
        return slice(self.starts[k], self.starts[k + 1])


def row_index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An index (N,) int64 that remembers its values: nothing has to ask the device for them, and a plan on fake tensors, which
    have none, takes the kernel that the run takes."""
    index = torch.tensor(numbers, dtype=torch.int64, device=device)
    index.numbers = tuple(numbers)
    return index


def numbers_of(bank: KeepsRows, index: Tensor) -> tuple[int, ...] | None:
    """The values of an index; None where it has none."""
    if len(bank.ranks) == 1:
        return (0,) * index.shape[0]
    known = getattr(index, "numbers", None)
    return tuple(index.tolist()) if known is None and has_values(index) else known


# -- the kernels: x (N, T, in) and index (N,) -> (N, T, out), in the dtype of the bank ----------------------------------------
def stacked(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    total = bank.starts[-1]
    hidden = _shrink(x.reshape(-1, x.shape[-1]), bank.A[:total]).view(*x.shape[:2], total)
    hidden = hidden.masked_fill(bank.made_of(index, _others), 0.0)
    return _expand(hidden.flatten(0, 1), bank.B[:total], bank.out_features).view(*x.shape[:2], bank.out_features)


def gathered(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    return _batched(x, *bank.made_of(index, _by_row, keep=not bank.learns), bank)


def grouped(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    present, places, back = bank.made_of(index, _groups)
    A, B = bank.made_of(index, _by_group, keep=not bank.learns)
    own = (x if places is None else x.index_select(0, places)).reshape(len(present), -1, x.shape[2])
    change = _batched(own, A, B, bank).view(-1, x.shape[1], bank.out_features)
    return change if back is None else change.index_select(0, back)


def segmented(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    runs, order, back = bank.made_of(index, _sorted_runs)
    if order is None:
        return _run_by_run(x, runs, bank)
    return _run_by_run(x.index_select(0, order), runs, bank).index_select(0, back)


def looped(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    return _run_by_run(x, bank.made_of(index, _runs), bank)


KERNELS = {"stacked": stacked, "gathered": gathered, "grouped": grouped, "segmented": segmented, "looped": looped}


def change_of_rows(x: Tensor, index: Tensor, bank: Bank) -> Tensor:
    """The change of the output, bias included, by the kernel that was quickest: x (N, T, in) in the bank's dtype, index (N,)
    -> (N, T, out)."""
    if takes_triton(x, bank):
        change = x.new_zeros(*x.shape[:2], bank.out_features)
        if add_in_place(change, x, index, bank):
            return change
    change = KERNELS[kernel_for(x, index, bank)](x, index, bank)
    return change if bank.bias is None else change + bank.bias.index_select(0, index).unsqueeze(1)


def kernel_for(x: Tensor, index: Tensor, bank: Bank) -> str:
    """The name of the kernel that `change_of_rows` takes. Kept with the bank, since a decode step asks at every site."""
    learning = torch.is_grad_enabled() and (bank.learns or x.requires_grad)
    place = (x.device, x.shape[0], x.shape[1], learning)
    names, key = bank.made_of(index, _no_names), (*place, bank.in_features, bank.out_features, bank.dtype, bank.kind, bank.finite)
    if key not in names:
        names[key] = _pick(*place, index, bank)
    return names[key]


def _pick(device: torch.device, rows: int, tokens: int, learning: bool, index: Tensor, bank: Bank) -> str:
    numbers = bank.made_of(index, numbers_of)
    if device.type != measured()["device"] or not rows or numbers is None:
        return "looped" if rows and len(bank.ranks) == 1 else DEFAULT
    present = Counter(numbers)
    whole = len(present) == len(bank.ranks)  # else `stacked` would multiply adapters that no row has
    among = tuple(KERNELS) if whole and not learning and bank.finite else tuple(KERNELS)[1:]
    mean = max(1, round(sum(bank.ranks[k] for k in present) / len(present)))
    return choose(rows, tokens, len(present), mean, bank.in_features, bank.out_features, bank.dtype, device,
                  widest=max(1, max(bank.ranks)), fullest=max(present.values()), kind=bank.kind, among=among)


# -- the choice ---------------------------------------------------------------------------------------------------------------
def choose(rows: int, tokens: int, distinct: int, rank: int, in_features: int, out_features: int, dtype: torch.dtype,
           device: torch.device, *, widest: int | None = None, fullest: int | None = None, kind: str = "factors",
           among: tuple[str, ...] = tuple(KERNELS)) -> str:
    """The kernel that was quickest at the nearest measured point, nearest by the sum of the squared ratios of logarithms.

    distinct: adapters among the rows; rank: their mean rank; widest: the largest, to which the batched products pad; fullest:
    the most rows of one adapter, to which `grouped` pads. A dtype that was not measured is judged by fp32; on a device that was
    not measured the answer is DEFAULT."""
    if device.type != measured()["device"]:
        return DEFAULT
    name = str(dtype).removeprefix("torch.")

    def at(rows: int, rank: int) -> dict[str, float]:
        return _nearest(kind, name, (max(1, rows), max(1, tokens), max(1, distinct), rank, in_features, out_features))

    times = dict(at(rows, rank))
    if widest is not None and widest != rank:
        times["gathered"], times["grouped"] = (at(rows, widest).get(each, math.inf) for each in ("gathered", "grouped"))
    if fullest is not None and distinct * fullest > rows:
        times["grouped"] = at(distinct * fullest, widest or rank).get("grouped", math.inf)
    return min(among, key=lambda name: times.get(name, math.inf))


@cache
def measured() -> dict[str, Any]:
    """The table: {device, conditions, columns, rows}. A row is a point (kind, dtype, and the six sizes) and the times in
    microseconds, null for a kernel that was not run there."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _points(kind: str, dtype: str) -> list[tuple[tuple[float, ...], dict[str, float]]]:
    table = measured()
    names = table["columns"][8:]
    of_kind = [row for row in table["rows"] if row[0] == kind]
    own = [row for row in of_kind if row[1] == dtype] or [row for row in of_kind if row[1] == "float32"]
    return [(tuple(map(math.log2, row[2:8])), {name: time for name, time in zip(names, row[8:]) if time is not None}) for row in own]


@lru_cache(2**14)
def _nearest(kind: str, dtype: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """{kernel: time} of the nearest point; the first of several equally near ones."""
    place = tuple(map(math.log2, sizes))
    return min(_points(kind, dtype), key=lambda point: sum((a - b) ** 2 for a, b in zip(point[0], place)))[1]


# -- what the kernels make of an index ----------------------------------------------------------------------------------------
def _no_names(bank: Bank, index: Tensor) -> dict[tuple, str]:
    return {}


def _others(bank: Bank, index: Tensor) -> Tensor:
    """(N, 1, R): True at the lines of other adapters than the row's."""
    owner = torch.tensor([k for k, r in enumerate(bank.ranks) for _ in range(r)], dtype=torch.int64,
                         device=index.device)
    return (index.unsqueeze(1) != owner).unsqueeze(1)


def _factors(bank: Bank, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A (N, in, r), B (N, r, out)) of the chosen adapters (None: all, in their order), ranks padded to the largest; positions
    (N, 1, r). Views of the bank where nothing has to be padded or picked."""
    widest, count = max(bank.ranks), len(bank.ranks) if chosen is None else chosen.shape[0]
    ragged = len(set(bank.ranks)) > 1
    if ragged:
        lines = torch.tensor([[start + j if j < r else bank.starts[-1] for j in range(widest)]
                              for start, r in zip(bank.starts, bank.ranks)], device=bank.A.device)
        lines = (lines if chosen is None else lines.index_select(0, chosen)).flatten()

    def pick(whole: Tensor) -> Tensor:
        shape = (widest, *whole.shape[1:])
        if ragged:
            return whole.index_select(0, lines).view(count, *shape)
        every = whole.view(len(bank.ranks), *shape)
        return every if chosen is None else every.index_select(0, chosen)

    A, B = pick(bank.A), pick(bank.B)
    return A.unsqueeze(1) if A.dim() == 2 else A.transpose(1, 2), B.unsqueeze(1) if B.dim() == 2 else B


def _by_row(bank: Bank, index: Tensor) -> tuple[Tensor, Tensor]:
    return _factors(bank, index)


def _by_group(bank: Bank, index: Tensor) -> tuple[Tensor, Tensor]:
    present = bank.made_of(index, _groups)[0]
    return _factors(bank, None if len(present) == len(bank.ranks) else torch.tensor(present, device=index.device))


def _groups(bank: Bank, index: Tensor) -> tuple[list[int], Tensor | None, Tensor | None]:
    """(adapters that occur, the rows side by side by adapter, the place of each row there); None for both where that is the order
    they have. A group is filled up with its own first row: a broken row of another adapter must not reach its gradient."""
    groups: dict[int, list[int]] = {}
    for row, k in enumerate(bank.made_of(index, numbers_of)):
        groups.setdefault(k, []).append(row)
    present, most = sorted(groups), max(map(len, groups.values()))
    places = [row for k in present for row in (*groups[k], *groups[k][:1] * (most - len(groups[k])))]
    if places == list(range(index.shape[0])):
        return present, None, None
    back = {row: place for place, row in reversed(list(enumerate(places)))}
    return (present, torch.tensor(places, device=index.device),
            torch.tensor([back[row] for row in range(index.shape[0])], device=index.device))


def _runs(bank: Bank, index: Tensor) -> list[tuple[int, slice]]:
    """[(first row, rows, lines of the adapter)] of neighbors with one adapter."""
    return [(len(list(run)), bank.bounds(k)) for k, run in groupby(bank.made_of(index, numbers_of))]


def _sorted_runs(bank: Bank, index: Tensor) -> tuple[list[tuple[int, slice]], Tensor | None, Tensor | None]:
    """(runs of the sorted rows, the order that sorts them, the order that undoes it); None for both where equal rows are neighbors."""
    runs = bank.made_of(index, _runs)
    numbers = bank.made_of(index, numbers_of)
    if len(runs) == len(set(numbers)):
        return runs, None, None
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    back = sorted(range(len(order)), key=order.__getitem__)
    return ([(len(list(run)), bank.bounds(k)) for k, run in groupby(sorted(numbers))],
            torch.tensor(order, device=index.device), torch.tensor(back, device=index.device))


OF_RANKS = frozenset((numbers_of, _no_names, _others, _groups, _runs, _sorted_runs))


# -- the two products ---------------------------------------------------------------------------------------------------------
def _shrink(x: Tensor, A: Tensor) -> Tensor:
    """(M, in) -> (M, r)."""
    return x @ A.T if A.dim() == 2 else x.index_select(1, A)


def _expand(hidden: Tensor, B: Tensor, out_features: int) -> Tensor:
    """(M, r) -> (M, out)."""
    return hidden @ B if B.dim() == 2 else hidden.new_zeros(hidden.shape[0], out_features).index_add(1, B, hidden)


def _batched(x: Tensor, A: Tensor, B: Tensor, bank: Bank) -> Tensor:
    """x (N, M, in) with factors of its own for each of the N -> (N, M, out)."""
    hidden = x.gather(-1, A.expand(-1, x.shape[1], -1)) if bank.A.dim() == 1 else torch.bmm(x, A)
    if bank.B.dim() == 2:
        return torch.bmm(hidden, B)
    return x.new_zeros(*x.shape[:2], bank.out_features).scatter_add(-1, B.expand(-1, x.shape[1], -1), hidden)


def _run_by_run(x: Tensor, runs: list[tuple[int, slice]], bank: Bank) -> Tensor:
    """x (N, T, in) -> (N, T, out), adapter after adapter. Without gradients each product is written in its place."""
    rows, tokens, out = x.shape[0], x.shape[1], bank.out_features
    flat = x.reshape(-1, x.shape[-1])
    in_place = bank.B.dim() == 2 and not (torch.is_grad_enabled() and (bank.learns or x.requires_grad))
    change = x.new_empty(rows * tokens, out) if in_place else None
    parts, start = [], 0
    for count, lines in runs:
        stop = start + count * tokens
        hidden = _shrink(flat[start:stop], bank.A[lines])
        if in_place:
            torch.mm(hidden, bank.B[lines], out=change[start:stop])
        else:
            parts.append(_expand(hidden, bank.B[lines], out))
        start = stop
    if not in_place:
        change = parts[0] if len(parts) == 1 else torch.cat(parts)
    return change.view(rows, tokens, out)
