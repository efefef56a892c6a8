"""The contract of an adapter: the learned change of one site.

Letters: N rows of the batch, T tokens, in/out features of the site, r rank, K adapters in a bank.
Kept apart: what is *stored* (parameters, seeds, indices), how the operator is *built* (factors, delta_weight), how it is
*applied* (delta, forward, forward_rows). Learned tensors are fp32; they are cast to the dtype of x when applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..modeling.protocols import Base, Product
from ..registry import MethodConfig
from .batched import Bank, change_of_rows


class SiteShape(Protocol):
    """What an adapter may know of its site."""

    name: str
    in_features: int
    out_features: int
    layer: int
    role: str


SAVED = "whole linear modules (a task head, say) that are trained and saved beside the adapter"
TOKENS = "ids or strings of tokens whose embedding rows are trained and saved too; {module: tokens} names embedding or head"
#: tokens by id or string: rows of the input embedding, or {module name: rows of that embedding or output head}
TokenChoice = list[int | str] | dict[str, list[int | str]]


class AdapterConfig(MethodConfig):
    """Options every adapter has (PEFT's meaning)."""

    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] = []
    layers_to_transform: list[int] | None = None
    modules_to_save: list[str] = Field([], description=SAVED)
    trainable_tokens: TokenChoice = Field([], description=TOKENS)


class Adapter(nn.Module):
    """The change of one site. A method overrides `factors` (low rank), or `delta` and `delta_weight` (additive, any
    rank), or `forward`, `rows_inputs`, `rows_combine` and `delta_weight` (multiplicative)."""

    scope: ClassVar[str] = "site"  # site | block | model
    position: ClassVar[str] = "outside"  # outside | inside | metadata, relative to the quantiser
    merge_exactness: ClassVar[str] = "exact"  # exact | by_construction | lossy
    multiplicative: ClassVar[bool] = False  # changes the frozen product itself, so it cannot be summed with others
    seeded: ClassVar[bool] = False  # part of the operator is regenerated from a seed and never saved
    starts_at_identity: ClassVar[bool] = True
    random_start: ClassVar[bool] = True  # False: nothing is drawn, so every seed gives the same start
    moves: ClassVar[tuple[str, ...]] = ()  # frozen parameters that checkpoints hold too: a selection changes them, or data set them
    owns_leaf: ClassVar[str | None] = None  # the leaf of a stored weight that it trains: without one it has nothing to train
    restarts_on_load: ClassVar[bool] = False  # `start` runs before an artifact is read too: what it sets is not saved

    def __init__(self, site: SiteShape, config: AdapterConfig, *, shared: nn.Module | None, generator: torch.Generator):
        super().__init__()
        self.site_name, self.in_features, self.out_features = site.name, site.in_features, site.out_features
        self.dropout = 0.0

    def drop(self, x: Tensor, base: Base) -> Tensor:
        """Dropout of the adapter's input (any shape), in training only, from the model's clock."""
        if self.dropout and self.training and torch.is_grad_enabled():
            return base.noise.dropout(x, self.dropout, self.site_name)
        return x

    @classmethod
    def derived_traits(cls) -> dict[str, Any]:
        """Traits that follow from which methods a class overrides."""
        def overrides(name: str) -> bool:
            return getattr(cls, name) is not getattr(Adapter, name)

        return {"scope": cls.scope, "position": cls.position, "merge_exactness": cls.merge_exactness, "seeded": cls.seeded,
                "multiplicative": cls.multiplicative, "needs_weights": overrides("start"), "low_rank": overrides("factors"),
                "mergeable": overrides("factors") or overrides("delta_weight"), "edits_base": overrides("base_edit"),
                "starts_at_identity": cls.starts_at_identity, "owns_leaf": cls.owns_leaf}

    # -- once per graft --------------------------------------------------------------------------------------------
    @classmethod
    def make_shared(cls, sites: Sequence[SiteShape], config: AdapterConfig, seed: int) -> nn.Module | None:
        """Pools and bases that all sites share; registered once, as a child of the model."""
        return None

    @classmethod
    def parameter_count(cls, site: SiteShape, config: AdapterConfig) -> int:
        """Number of trained values at this site, by the method's formula."""
        raise NotImplementedError

    def start(self, product: Product, pristine: Callable[[], Tensor], generator: torch.Generator) -> None:
        """Set what the method takes from the weight, once, when a new graft is attached (on the weight's device).

        product: the frozen map as it computes. pristine(): W (out, in) fp32 as it is in the model's file. Shapes only while a
        run is planned (fake tensors). Runs before an initializer, and not before an artifact is loaded."""

    def borrowed(self) -> tuple[nn.Parameter, ...]:
        """Trained parameters of the shared module that this site's operator reads: a kept bank is stale when they change."""
        return ()

    # -- built -----------------------------------------------------------------------------------------------------
    def factors(self, base: Base | None = None) -> tuple[Tensor, Tensor] | None:
        """(B (out, r), A (r, in)), exact, scale folded in; None where the change is not low-rank."""
        return None

    def own_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(B (out, r), A (r, in), s), stored tensors whose s B A is all that the adapter does in evaluation; None where it is not."""
        return None

    def delta_weight(self, base: Base) -> Tensor | None:
        """Exact change of W, (out, in) in fp32; None when it depends on the input."""
        pair = self.factors(base)
        return None if pair is None else pair[0].float() @ pair[1].float()

    def delta_bias(self) -> Tensor | None:
        """Change of the bias (out,), or None."""
        return None

    def base_edit(self) -> tuple[Tensor, Tensor] | None:
        """(B0, A0) of the low-rank part of W that this adapter replaces (W is used as W - B0 A0), or None."""
        return None

    def held_by(self, product: Product, weight: float, *, exact: bool) -> nn.Module | None:
        """A storage that holds W + weight * change in codes and metadata, where there is one that needs no new codes for it (or that
        the method is trained for); None: merging makes W dense. exact: as in `Storage.with_leaves`. product: the whole map of a site."""
        return None

    def moved_rows(self) -> tuple[Tensor, Tensor] | None:
        """(ids (k,) int64, change (k, in) in fp32) where all that the adapter does is to change single rows of W, else None."""
        return None

    # -- applied -----------------------------------------------------------------------------------------------------
    def delta(self, x: Tensor, base: Base) -> Tensor:
        """Change of the output: x (..., in) -> (..., out)."""
        B, A = self.factors(base)
        change = linear(linear(self.drop(x, base), A.to(x.dtype)), B.to(x.dtype))
        bias = self.delta_bias()
        return change if bias is None else change + bias.to(x.dtype)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Whole output of the site: x (..., in) -> (..., out)."""
        return base(x) + self.delta(x, base)

    # -- many rows, many adapters -------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters: Sequence[Adapter], dtype: torch.dtype) -> Any:
        """A Bank of these adapters in the dtype of the product. Differentiable: one Parameter per adapter stays, so an adapter
        that is absent from the batch gets no gradient."""
        first, pairs, biases = adapters[0], [a.factors(None) for a in adapters], [a.delta_bias() for a in adapters]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.stack([pairs[0][0].new_zeros(a.out_features) if b is None else b for a, b in zip(adapters, biases)])
        return Bank.of(pairs, (first.out_features, first.in_features), dtype, bias=bias, dropout=cls.bank_dropout(adapters),
                       key=first.site_name)

    @staticmethod
    def bank_dropout(adapters: Sequence[Adapter]) -> Tensor | None:
        """Dropout probabilities (K,) when any adapter of the bank is training with dropout."""
        rates = [a.dropout if a.training else 0.0 for a in adapters]
        return torch.tensor(rates) if any(rates) and torch.is_grad_enabled() else None

    @classmethod
    def forward_rows(cls, bank: Any, index: Tensor, x: Tensor, base: Base) -> Tensor:
        """Change of the output for rows of different adapters: x (N, ..., in), index (N,) int64 into the bank ->
        (N, ..., out)."""
        shape = x.shape
        if bank.dropout is not None:
            x = base.noise.dropout(x, bank.dropout.to(x.device)[index].reshape(-1, *[1] * (x.dim() - 1)), bank.key)
        change = change_of_rows(as_rows(x).to(bank.dtype), index, bank).to(x.dtype)
        return change.reshape(*shape[:-1], change.shape[-1])

    @classmethod
    def rows_inputs(cls, bank: Any, index: Tensor, x: Tensor) -> Tensor:
        """Multiplicative classes: the inputs (N*k, ..., in) for which the frozen product is wanted."""
        raise NotImplementedError

    @classmethod
    def rows_combine(cls, bank: Any, index: Tensor, z: Tensor, x: Tensor, base: Base) -> Tensor:
        """Multiplicative classes: the products z (N*k, ..., out) of `rows_inputs(..., x)` back to outputs (N, ..., out), without
        the bias of the base (which is added to them afterwards)."""
        raise NotImplementedError

    # -- training ------------------------------------------------------------------------------------------------------
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of this adapter's trained parameters: {params, lr_scale, weight_decay?, update_gain?}. lr_scale multiplies the
        rate; update_gain (a function of the value before the step) multiplies the step, entry by entry."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr_scale": 1.0}]

    def auxiliary_loss(self) -> Tensor | None:
        """Term that the method adds to the loss, or None."""
        return None

    # -- stored --------------------------------------------------------------------------------------------------------
    def artifact_state(self) -> dict[str, Tensor]:
        """What the artifact keeps: all parameters, trained and frozen. Nothing that a seed gives back is one."""
        return dict(self.named_parameters())

    def load_artifact_state(self, state: dict[str, Tensor]) -> None:
        """The inverse. Raises RuntimeError for missing or unexpected names and wrong shapes."""
        self.load_state_dict(state)

    def resume(self) -> None:
        """Called after loading when the adapter goes on training: what is kept in a packed form gets trainable values."""

    def stored_extra(self) -> dict[str, Any] | None:
        """JSON facts saved with this site's tensors (a checksum of regenerated numbers, say), or None."""
        return None

    def check_extra(self, extra: dict[str, Any]) -> None:
        """Called with what `stored_extra` gave, after loading. Raises ArtifactError when it does not hold."""


def as_rows(x: Tensor) -> Tensor:
    """x (N, ..., n) as (N, T, n), also for N = 0."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's per-module override: keys are regular expressions matched as `(.*\\.)?(KEY)$`, the first match wins."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
