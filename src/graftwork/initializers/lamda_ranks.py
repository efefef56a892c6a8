"""LaMDA++: ranks from the spectra of the weights, under a budget (arXiv 2406.12832).

    e_i(k) = sum of the k largest squared singular values of W_i / |W_i|_F^2
    every site begins with rank 1; then the site with the smallest e_i(r_i) gets one more, until sum r_i = L r (L sites, r the
    config's rank) or every site has reached round(rho r)

So the kept shares of energy are leveled: a weight whose spectrum decays slowly gets more rank than one that a few components
describe. Nothing is scored during training. alpha_i / r_i stays alpha / r.

The paper's score could not be confirmed and the released code has none: the rule above is ours, of the kind it describes. The
budget counts ranks. Wide weights have slow spectra and get more rank, so the parameters (r_i^2 + r_i out) can exceed those of
equal ranks: by 27 % on SmolLM2-135M at r = 32.
"""

from __future__ import annotations

import heapq

import torch
from pydantic import Field
from torch import Tensor

from ..registry import MethodConfig, register
from .base import Initializer
from .pissa import randomized_svd

#: power iterations of the randomized SVD that gives the leading singular values
ITERATIONS = 8


class LaMDARanks(MethodConfig):
    """Options of `lamda_ranks`."""

    rho: float = Field(2.0, gt=1.0, description="a site's rank is at most round(rho * r)")


def level(energies: dict[str, list[float]], budget: int) -> dict[str, int]:
    """{site: rank}, at least 1 and at most len(energies[site]) each, that level the kept energy. energies: the share of the squared
    norm in each component, largest first. Sums to the budget where these bounds allow it; ties go by name."""
    counts = {name: 1 for name in energies}
    heap = [(shares[0], name) for name, shares in energies.items() if len(shares) > 1]
    heapq.heapify(heap)
    for _ in range(budget - len(counts)):
        if not heap:
            break
        kept, name = heapq.heappop(heap)
        place = counts[name]
        counts[name] = place + 1
        if place + 1 < len(energies[name]):
            heapq.heappush(heap, (kept + energies[name][place], name))
    return counts


@register("initializer", "lamda_ranks", config=LaMDARanks, paper="2406.12832",
          title="LaMDA++: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
          summary="ranks from the spectra of the weights under a budget: slow decay gets more",
          bibtex="@inproceedings{azizi2024lamda, title={LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional "
                 "Adaptation}, author={Azizi, Seyedarmin and Kundu, Souvik and Pedram, Massoud}, booktitle={Findings of EMNLP}, "
                 "year={2024}}")
class LaMDARanksInitializer(Initializer):
    needs = "weights"
    methods = ("lamda",)

    def plan(self, sites, config):
        return {s.name: min(round(self.config.rho * config.r), s.in_features, s.out_features) for s in sites}

    @torch.no_grad()
    def statistics(self, model, sites, config, batches):
        """{site: share of |W|^2 in each of its largest components}."""
        most = self.plan(sites, config)
        return {s.name: _shares(self.pristine(s).double(), most[s.name]) for s in sites}

    def ranks(self, sites, config, statistics):
        return level(statistics, config.r * len(sites))

    def build(self, site, product, adapter, statistics, generator):
        """Nothing: the adapter has taken its start, at the rank given here."""


def _shares(W: Tensor, most: int) -> list[float]:
    singular = randomized_svd(W, most, ITERATIONS, torch.Generator().manual_seed(0))[1][:most]
    return (singular.square() / W.square().sum()).tolist()
