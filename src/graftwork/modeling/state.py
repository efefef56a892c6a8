"""The state of one forward pass: which adapter answers which row, and the clock that seeds noise.

It lives on the model (`model.graft_state`), not in a ContextVar: activation checkpointing re-runs forwards from
autograd's threads, where a ContextVar is lost, and Dynamo cannot trace one. `current` is a frozen value; every
change is a new value set for a scope and put back afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class ForwardState:
    """rows: one graft name (or None for the bare base) per row of the batch; None: every attached graft acts on every row. A row
    may also name a sum of additive grafts, ((name, weight), ...).
    expansion: how many consecutive rows of the tensor belong to one named row (beams).
    token_rows: for callers that re-indexed tokens, the row (int64, (M,)) of each of the M tokens of a site's input.
    places: beside it, where each of these tokens stands in the flat batch (row * T + t), where the caller knows.
    packed: the batch is one row (1, M, ...) with the tokens of all rows, told apart by token_rows; without, one token a row.
    disabled: names of grafts that are off. seed, step, micro: the clock from which noise is drawn.
    merged: the rows' own graft (or sum), which is in the sites' merged copies of the weights (see adapters/merged_copy.py); such rows are
    named None. None: the sites multiply their own weights.
    labels: of the batch (N, T), -100 where nothing is trained; a prefix that depends on the prompt tells it from the answer
    by them. None: all input is prompt.
    real: (N, T) bool, False at padding; None: nothing is known to be padding.
    recomputing: True while activation checkpointing repeats a forward (losses, statistics, counters must not count it).
    kept: what sites make once for all of them while one micro-batch goes forward and back, by key; gone with the state. None: the
    state is not of one micro-batch, and nothing may be kept."""

    rows: tuple[str | None | tuple[tuple[str, float], ...], ...] | None = None
    expansion: int = 1
    token_rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    packed: bool = False
    disabled: frozenset[str] = frozenset()
    merged: str | tuple[tuple[str, float], ...] | None = None
    seed: int = 0
    step: int = 0
    micro: int = 0
    labels: torch.Tensor | None = None
    real: torch.Tensor | None = None
    recomputing: bool = False
    kept: dict | None = field(default=None, compare=False, repr=False)


class StateHolder:
    """Holds the current ForwardState of one model; every site of the model refers to the same holder."""

    def __init__(self) -> None:
        self.current = ForwardState()
        self.grafts: dict = {}  # name -> Graft, in the order of attaching
        self.indices: dict = {}  # of named rows in packed steps, which all sites share; bounded by who fills it

    @contextmanager
    def scope(self, **changes) -> Iterator[ForwardState]:
        """Set some fields for a scope; restored even when the body raises."""
        before = self.current
        self.current = replace(before, **changes)
        try:
            yield self.current
        finally:
            self.current = before

    @contextmanager
    def _reenter(self, state: ForwardState) -> Iterator[None]:
        before, self.current = self.current, state
        try:
            yield
        finally:
            self.current = before

    def tokens(self, index: torch.Tensor):
        """Scope for a caller that hands sites re-indexed tokens: `index` (M,) int64 gives the batch row of each token."""
        outer = self.current.token_rows
        return self.scope(token_rows=index if outer is None else outer.index_select(0, index))

    def checkpoint_contexts(self):
        """`context_fn` of non-reentrant activation checkpointing: the recomputation sees the state of the forward."""
        captured = self.current
        return self._reenter(captured), self._reenter(replace(captured, recomputing=True))

    def checkpoint_kwargs(self) -> dict:
        """For `model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=...)`."""
        return {"use_reentrant": False, "context_fn": self.checkpoint_contexts}

    def generator(self, key: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Noise source that is a function of (seed, step, micro, key) alone, so that a recomputed forward repeats it."""
        state = self.current
        digest = hashlib.blake2b(f"{state.seed}/{state.step}/{state.micro}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
        return generator

    def dropout(self, x: torch.Tensor, p: float | torch.Tensor, key: str) -> torch.Tensor:
        """Inverted dropout of x (any shape) with probability p (a number, or a tensor that broadcasts to x),
        reproducible from the clock."""
        noise = torch.rand(x.shape, generator=self.generator(key, x.device), device=x.device, dtype=torch.float32)
        return torch.where(noise >= p, x / (1.0 - p), 0.0).to(x.dtype)

    def row_index(self, x: torch.Tensor, *, flat: bool = False) -> torch.Tensor | None:
        """Row (int64 on x's device) of each entry of x's first dimension, or None when that is simply 0..N-1.
        flat: x may be (N*T, in), the tokens of all rows one row after the other.

        Raises UsageError when x's first dimension fits neither the named rows nor a declared expansion."""
        state = self.current
        assert state.rows is not None
        named, got = len(state.rows), x.shape[0]
        if state.token_rows is not None:
            if state.token_rows.shape[0] != got:
                raise UsageError(f"a site got {got} tokens, but {state.token_rows.shape[0]} were announced by state.tokens()")
            return state.token_rows
        if got == named and state.expansion == 1:
            return None
        if flat and x.dim() == 2 and got and got % (named * state.expansion) == 0:
            return torch.arange(got, device=x.device) // (got // named)
        if got == named * state.expansion:
            return torch.arange(got, device=x.device) // state.expansion
        raise UsageError(
            f"routing names {named} rows but a site received a tensor whose first dimension is {got}",
            remedy="name one adapter per row of the batch; for beams or several samples a row pass expansion=n; "
                   "code that re-indexes tokens must call its sites inside model.graft_state.tokens(index)")


def state_of(model: torch.nn.Module) -> StateHolder:
    """The model's holder; made on first use."""
    holder = model.__dict__.get("graft_state")
    if holder is None:
        holder = StateHolder()
        model.__dict__["graft_state"] = holder
    return holder
