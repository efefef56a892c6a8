"""S2FT: train whole attention heads and feed-forward channels of the frozen weight (arXiv 2412.06289).

    o, down, fc2 (units are columns):          y = W x + b + S x[I],        S (out, n) trained
    q, k, v, gate, up, fc1 (units are rows):   y = W x + b, y[I] += S x,    S (n, in) trained
    I (n,): the lines of the chosen units; S = 0 at the start. Parameters n out (columns) or n in (rows).

Of all units that the sites of a role have in the whole model int(ratio * units) are chosen, so that their number differs between
layers; with per_layer the same number int(ratio * units) in each site (one at least). They are drawn at random (S2FT-R), or are
those whose lines of W have the largest or the smallest norm (S2FT-W); the choices that look at data, by activations, products or
gradients (S2FT-A, -S, -G), are the initializers `s2ft_activations` and `s2ft_gradients`. A unit is a
query head (q, o), a key/value head (k, v), a key/value head with its query heads (a fused qkv), or a channel (two rows where
gate and up are one map), see modeling/coupling.py; `ratio_pattern` gives sites other ratios, the first match wins. By default
3 % of the channels of down are trained, as in the paper. A site of which nothing was drawn trains nothing.

For columns the backward pass keeps x[I] only, n values a token. Lines of a site are a low-rank change (rank n), so it merges and
converts exactly, and grafts with disjoint units add up without touching each other's lines.

Differs from the paper: weights are never permuted. The paper moves chosen units to the front, so that each trained slice is
contiguous; the function is the same, but a permuted base is of no use to other grafts. Its code mixes query and key/value heads
up under grouped attention. The stored lines (int32) are those of the original model, so a load chooses nothing anew. Norms are
Euclidean, over all lines of a unit: the card of the paper does not say which it takes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import linear
from ..modeling.coupling import Units, units_of
from ..modeling.protocols import has_values
from ..registry import register
from ._weights import weight_of_site
from .base import Adapter, AdapterConfig, pattern_value
from .batched import Bank


class S2FT(AdapterConfig):
    """Options of `s2ft`."""

    target_modules: str | list[str] = ["down", "fc2", "down_proj"]
    ratio: float = Field(0.03, gt=0.0, le=1.0, description="share of the units that is trained")
    ratio_pattern: dict[str, float] = {}
    per_layer: bool = Field(False, description="the same number of units in every layer, instead of a draw over all layers")
    selection: Literal["random", "weight_large", "weight_small"] = "random"


class Choice(nn.Module):
    """What the sites share: the axis and the drawn lines of each. Holds no parameter."""

    def __init__(self, lines: dict[str, tuple[str, list[int]]]):
        super().__init__()
        self.lines = lines


def line_squares(W: Tensor, axis: str) -> Tensor:
    """Squared norms of the columns or rows of W (out, in), in fp64."""
    return W.double().square().sum(0 if axis == "columns" else 1)


@register("adapter", "s2ft", config=S2FT, paper="2412.06289",
          title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
          summary="trains whole heads and channels: rows or columns of the weight that belong together",
          bibtex="@inproceedings{yang2024s2ft, title={S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured "
                 "Sparsity}, author={Yang, Xinyu and Leng, Jixuan and Guo, Geyang and Zhao, Jiawei and Nakada, Ryumei and Zhang, "
                 "Linjun and Yao, Huaxiu and Chen, Beidi}, booktitle={NeurIPS}, year={2024}}")
class S2FTAdapter(Adapter):
    moves = ("lines",)  # data may have chosen them

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.axis, lines = shared.lines[site.name]
        self.take(lines, torch.device("cpu"))

    def take(self, lines: list[int], device: torch.device) -> None:
        """Train these lines, from zero."""
        self.lines = nn.Parameter(torch.tensor(lines, dtype=torch.int32, device=device), requires_grad=False)
        shape = (self.out_features, len(lines)) if self.axis == "columns" else (len(lines), self.in_features)
        self.register_parameter("S", nn.Parameter(torch.zeros(shape, device=device)) if lines else None)

    def load_artifact_state(self, state):
        kept, size = state.get("lines"), self.in_features if self.axis == "columns" else self.out_features
        if kept is not None and kept.dim() == 1 and kept.dtype == torch.int32:
            if kept.numel() and not (0 <= int(kept.min()) and int(kept.max()) < size):
                raise RuntimeError(f"lines outside of 0..{size - 1}")
            self.take(kept.tolist(), self.lines.device)
        super().load_artifact_state(state)

    @classmethod
    def make_shared(cls, sites, config, seed):
        scores = None
        if config.selection != "random" and has_values(next(sites[0].module.parameters())):
            scores = {site.name: cls.unit_scores(site, line_squares(weight_of_site(site), units_of(site).axis)) for site in sites}
        return Choice(cls.choose(sites, config, seed, scores, small=config.selection == "weight_small"))

    @staticmethod
    def unit_scores(site: Any, squares: Tensor) -> Tensor:
        """Root of the sums over each unit's lines; squares: one number a line of the site (of its axis)."""
        return squares.double().cpu()[units_of(site).index].sum(1).sqrt()

    @classmethod
    def choose(cls, sites: Sequence[Any], config: S2FT, seed: int, scores: dict[str, Tensor] | None = None, *,
               small: bool = False) -> dict[str, tuple[str, list[int]]]:
        """{site: (axis, lines)}: of each role's units those of the largest (smallest) scores {site: (units,)}; a draw without
        scores, and while a run is planned."""
        pools: dict[tuple, list] = {}
        for site in sites:  # roles are drawn independently of each other
            ratio = pattern_value(config.ratio_pattern, site.name, config.ratio)
            key = (site.role, getattr(site, "attribute", None), ratio, site.name if config.per_layer else "")
            pools.setdefault(key, []).append((site, units_of(site)))
        drawn = {}
        for key, members in pools.items():
            total = sum(units.count for _, units in members)
            wanted, first = max(1, int(key[2] * total)), 0
            if scores is None:
                name = f"{seed}/s2ft/{'/'.join(map(str, key))}".encode()
                generator = random.Random(hashlib.blake2b(name, digest_size=8).digest())
                chosen = set(generator.sample(range(total), wanted))
            else:
                pooled = torch.cat([scores[site.name] for site, _ in members])
                chosen = set(pooled.sort(descending=not small, stable=True).indices[:wanted].tolist())
            for site, units in members:
                own = [u for u in range(units.count) if first + u in chosen]
                drawn[site.name] = (units.axis, sorted(units.lines(own)))
                first += units.count
        return drawn

    @classmethod
    def parameter_count(cls, site, config):
        """Of a site with per_layer; without it this is the mean over the layers, rounded down to whole units."""
        bare = getattr(site, "model", None) is None  # a matrix without a model: its columns
        units = Units("columns", site.in_features, ((0, 1),)) if bare else units_of(site)
        chosen = max(1, int(pattern_value(config.ratio_pattern, site.name, config.ratio) * units.count))
        return chosen * units.width * (site.out_features if units.axis == "columns" else site.in_features)

    def factors(self, base=None):
        if self.S is None:
            zero = self.lines.new_zeros((), dtype=torch.float32)
            return zero.expand(self.out_features, 1), zero.expand(1, self.in_features)
        n, lines = self.lines.shape[0], self.lines.long().unsqueeze(1)
        size = self.in_features if self.axis == "columns" else self.out_features
        selector = torch.zeros(n, size, device=self.S.device).scatter(1, lines, 1.0)
        return (self.S, selector) if self.axis == "columns" else (selector.T, self.S)

    def delta_weight(self, base):
        change = torch.zeros(self.out_features, self.in_features, device=self.lines.device)
        if self.S is None:
            return change
        return change.index_copy(1 if self.axis == "columns" else 0, self.lines.long(), self.S.float())

    def delta(self, x, base):
        if self.S is None:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if self.axis == "columns":
            return F.linear(x.index_select(-1, self.lines), self.S.to(x.dtype))
        change = x.new_zeros(*x.shape[:-1], self.out_features)
        return change.index_copy(-1, self.lines.long(), linear(x, self.S.to(x.dtype)))

    def forward(self, x, base):
        return base(x) if self.S is None else super().forward(x, base)

    # -- many rows ---------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters, dtype):
        """A Bank one of whose factors is the lines themselves."""
        first, pairs = adapters[0], []
        for a in adapters:
            S = a.S if a.S is not None else torch.zeros((a.out_features, 0) if a.axis == "columns" else (0, a.in_features),
                                                        device=a.lines.device)
            pairs.append((S, a.lines) if a.axis == "columns" else (a.lines, S))
        return Bank.of(pairs, (first.out_features, first.in_features), dtype)
