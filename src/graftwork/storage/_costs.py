"""What every matrix of a model loses and takes in every one of several configurations of a storage: the table an allocation of bits
under a budget is made from (LQ-LoRA, arXiv 2311.12023).

    cost[i][c] = |W_i - D_c(W_i)|^2, weighted as below,      size[i][c] = bits of all leaves

LQ-LoRA counts errors after the low-rank part was fitted, so its configurations are those of `lowrank_plus`. Costs are as measured, not
normalised, and add up over matrices; sizes are of the leaves that a real storage has, not of a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..registry import make_config
from ._second_order import proxy_loss
from .base import Storage, StorageConfig, make_storage


@dataclass
class CostTable:
    """names: of the matrices; configs: of the columns; cost and size [matrix][config], size in bits; weights [matrix]: how many."""

    names: list[str]
    configs: list[StorageConfig]
    cost: list[list[float]]
    size: list[list[int]]
    weights: list[int]

    def budget(self, bits: float) -> float:
        """The size of the model at so many bits a weight."""
        return bits * sum(self.weights)


def configurations(method: str, **axes: Sequence[Any]) -> list[StorageConfig]:
    """Every combination of the given values of options of one storage. Raises UsageError for an option it has not."""
    return [make_config("storage", method, **dict(zip(axes, values))) for values in product(*axes.values())]


@torch.no_grad()
def cost_table(model: nn.Module, configs: Sequence[StorageConfig], *, statistics: Mapping[str, Any] | None = None,
               on_site: Callable[[str], None] | None = None) -> CostTable:
    """The table of a dense model, which is left as it is; one storage is alive at a time. The matrices are those `apply_storage` would
    replace under every one of configs. statistics: {matrix: InputStatistics}; where there are any, errors E count as sum F E^2 if they
    have `fisher`, else as tr(E H E^T) if they have `hessian`. on_site(name) is called after each matrix."""
    from ..modeling.experts import expert_linears
    from ..modeling.sites import linear_modules

    if not configs:
        raise UsageError("a table of costs needs configurations")
    skipped = {name for config in configs for name in config.skip_modules}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    sites = [(name, site) for name, module, site in linear_modules(model)
             if module is not head and not isinstance(module, Storage) and name.split(".")[-1] not in skipped]
    sites += [(f"{name}.{attribute}.{expert}", site) for name, _, attribute, expert, site in expert_linears(model)]
    table = CostTable([], list(configs), [], [], [])
    for name, site in sites:
        weight, found = site.dense().detach(), None if statistics is None else statistics.get(name)
        cost, size = [], []
        for config in configs:
            stored = make_storage(weight, config.method, config, statistics=found, dtype=torch.float32)
            cost.append(error_of(stored.dequantize() - weight.float(), found))
            size.append(round(stored.bits_per_weight * weight.numel()))
        table.names.append(name)
        table.cost.append(cost)
        table.size.append(size)
        table.weights.append(weight.numel())
        if on_site:
            on_site(name)
    return table


def error_of(difference: Tensor, statistics: Any) -> float:
    """What an error (out, in) counts: by `fisher` or `hessian` where statistics have one, else |E|_F^2."""
    if statistics is not None and statistics.fisher is not None:
        return float((statistics.fisher.double() * difference.double() ** 2).sum())
    if statistics is not None and (hessian := statistics.hessian) is not None:
        return float(proxy_loss(difference, hessian.to(difference.device)))
    return float((difference.double() ** 2).sum())
