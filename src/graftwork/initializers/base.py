"""The contract of an initializer: a plan, a statistics pass, then site by site `build`.

`plan` bounds the ranks without any values (for the planner); `statistics` runs once before any adapter exists; `ranks`
turns statistics into the rank of each site (0: no adapter there); `build` sets one adapter's starting point and may
return a new storage for the site (residual of a quantised base). It all happens before the optimizer exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import IncompatibleError, UsageError
from ..modeling.protocols import Product, StoredWeight
from ..modeling.source import pristine_weight
from ..registry import MethodConfig, MethodInfo


def requantizable(site: Any) -> bool:
    """Whether the residual can go into the storage: the site has a stored weight of its own, not rows or an expert of a larger one."""
    return isinstance(site.module, StoredWeight) and site.rows is None and site.expert is None


def quantized_like(model: nn.Module, site: Any, weight: Tensor) -> nn.Module:
    """A storage of the format that the site is kept in, for another weight (out, in)."""
    module = site.module
    kind = getattr(type(module), "plain_class", type(module))
    options = getattr(module, "options", model.graft_storage)
    return kind.from_weight(weight, kind.without_data(options), dtype=module.compute_dtype)


class Initializer:
    """One way to start. Subclasses set `needs` and override what they use."""

    needs: ClassVar[str | None] = None  # None | "weights" | "activations" | "gradients"
    methods: ClassVar[tuple[str, ...]] = ("lora",)  # adapters it can start

    def __init__(self, config: MethodConfig):
        self.config = config

    @classmethod
    def derived_traits(cls) -> dict[str, Any]:
        return {"needs": cls.needs, "adapters": list(cls.methods)}

    def bind(self, model: nn.Module) -> None:
        """Remember the model: its pristine weights, and how its stored sites are quantised."""
        self.model = model

    def pristine(self, site: Any) -> Tensor:
        """W (out, in) in fp32 as it is in the model's file, or as it is now where there is no file (dense sites only)."""
        return pristine_weight(self.model, site)

    def quantize(self, site: Any, weight: Tensor) -> nn.Module:
        """A storage of the site's own format for another weight (out, in)."""
        return quantized_like(self.model, site, weight)

    def check(self, adapter: MethodInfo, config: MethodConfig, sites: Sequence[Any]) -> None:
        """Raises IncompatibleError for an adapter it cannot start."""
        if adapter.name not in self.methods:
            raise IncompatibleError(f"initializer '{self.method}' starts {', '.join(self.methods)}, not '{adapter.name}'",
                                    remedy="use initializer: default")

    def plan(self, sites: Sequence[Any], config: MethodConfig) -> dict[str, int]:
        """Upper bound {site: rank} without looking at values; empty: the config's ranks."""
        return {}

    def statistics(self, model: nn.Module, sites: Sequence[Any], config: MethodConfig,
                   batches: Iterable[dict[str, Tensor]] | None) -> Any:
        """The pass over weights or data. Raises UsageError when it needs data and got none."""
        if self.needs in ("activations", "gradients"):
            if batches is None:
                raise UsageError(f"initializer '{self.method}' needs data: it reads {self.needs}",
                                 remedy="pass batches=... to attach, or use it in a recipe with data.train")
        return None

    def ranks(self, sites: Sequence[Any], config: MethodConfig, statistics: Any) -> dict[str, int]:
        """{site: rank} where it differs from the config."""
        return {}

    def build(self, site: Any, product: Product, adapter: nn.Module, statistics: Any,
              generator: torch.Generator) -> nn.Module | None:
        """Set the adapter's start at one site; returns the new storage of an edited, stored base, or None."""
        raise NotImplementedError

    def plan_extra(self, graft: Any) -> None:
        """Give a graft of the simulation the tensors that `build` would add to it (frozen pairs, say), without values."""
