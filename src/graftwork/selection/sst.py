"""SST's sampling of singular pairs (arXiv 2405.15481), for adapter `sst`, whose file has the parametrization.

    iteration   every `interval` steps each site puts its r trained pairs back and draws r others, without replacement, from
                p(i) = (1/a + sigma_i / sum sigma) / 2; optimizer state of the pairs is dropped, sigma's stays
    warm-up     in the first `warmup` steps of an iteration the k-th step of the pairs counts k / (warmup + 1): their moments are new
    each step   u_i, v_i <- unit norm, sigma <- max(sigma, 0)
    round       after `iterations` draws (default: a / r, rounded up, a site's own) the weight is decomposed again, which makes the
                pairs orthogonal; the function stays

The draw is a function of (seed, site, iteration) and of sigma, so a resume needs no state of the selection. The SVD is exact, in fp64,
one site at a time, where no gradients or activations are alive.

The paper gives neither the length of an iteration nor of the warm-up; both are options. Departure: after a decomposition
the i-th largest singular value stands where the i-th largest of before stood, so that sigma's moments still mean something.
Under fake tensors (a plan) a decomposition happens before every step, and the moments stay: the plan then holds a draw's memory and
that of a step between two draws.
"""

from __future__ import annotations

import hashlib

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from .base import Selection, SelectionContext, drop_state


class SSTSampling(MethodConfig):
    """Options of `sst`."""

    interval: int = Field(200, ge=1, description="steps between draws")
    iterations: int | None = Field(None, ge=1, description="draws between decompositions; null: all pairs once, a / r")
    warmup: int = Field(20, ge=0, description="steps after a draw in which the pairs' steps grow to full size")


@register("selection", "sst", config=SSTSampling, title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural "
          "Networks", paper="2405.15481", summary="draws which singular pairs of adapter sst train, and decomposes again each round",
          bibtex="@inproceedings{zhao2025sparse, title={Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural "
                 "Networks}, author={Zhao, Jialin and Zhang, Yingtao and Li, Xinghang and Liu, Huaping and Cannistraci, Carlo "
                 "Vittorio}, booktitle={ICML}, year={2025}}")
class SSTSelection(Selection):
    adapters = ("sst",)

    def __init__(self, config: SSTSampling | None = None):
        super().__init__(config or SSTSampling())
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, ctx: SelectionContext) -> None:
        self.check_graft(ctx)

    def decomposes(self, iteration: int, modes: int, r: int) -> bool:
        """Whether a site with that many singular values starts a round with this iteration (from 0)."""
        return iteration > 0 and iteration % (self.config.iterations or -(-modes // r)) == 0

    def before_step(self, ctx: SelectionContext) -> None:
        iteration, age = divmod(ctx.step, self.config.interval)
        for name, adapter in ctx.graft.adapters.items():
            planned = not has_values(adapter.sigma)
            if (age == 0 and iteration) or planned:
                adapter.redraw(_generator(ctx.seed, name, iteration),
                               decompose=planned or self.decomposes(iteration, adapter.modes, adapter.r))
                for pair in () if planned else (adapter.u, adapter.v):
                    drop_state(ctx.optimizer, pair)
        self._before = [] if age >= self.config.warmup else [
            (p, p.detach().clone()) for adapter in ctx.graft.adapters.values() for p in (adapter.u, adapter.v)]

    @torch.no_grad()
    def after_step(self, ctx: SelectionContext) -> None:
        share = (ctx.step % self.config.interval + 1) / (self.config.warmup + 1)
        for p, before in self._before:
            p.copy_(torch.lerp(before, p, share))
        self._before = []
        for adapter in ctx.graft.adapters.values():
            adapter.constrain()


def _generator(seed: int, site: str, iteration: int) -> torch.Generator:
    digest = hashlib.blake2b(f"sst/{seed}/{site}/{iteration}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
