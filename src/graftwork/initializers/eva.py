"""EVA: explained variance adaptation (arXiv 2410.07170). A starts at the principal directions of a site's inputs on task data,
and ranks move to the sites where they explain most.

    r_max = round(rho * r);  per site an incremental PCA of its input rows x (in,), r_max components, over minibatches
    pool the explained-variance ratios of all L sites (first r_max each), keep the L * r largest; a site's rank r_i is how many
    of them are its own (0: no adapter there);   A_i = its first r_i components (orthonormal rows; whiten: / sqrt(variance)),
    B_i = 0, so y is unchanged;   alpha_i / r_i stays alpha / r

The PCA of a site stops when each component that it needs has cosine >= tau with the one before the last batch; the pass ends
when all have stopped, or after `max_batches` (the batches are repeated if there are fewer); so where it ends, and with it the
start, depends on their order. Sites that read one tensor (q, k, v; gate, up) share one PCA. rho = 1 keeps all ranks. Only rows of
trained tokens count when label_mask is set (of unpadded ones otherwise); a batch with fewer rows than components is skipped.

Differs from the official code: the PCA's SVD is exact, and shared inputs are recognised by the tensor itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..registry import MethodConfig, register
from ._activations import ActivationPass, counted_rows, token_mask


class EVA(MethodConfig):
    """Options of `eva`."""

    rho: float = Field(2.0, ge=1.0, description="a site's rank is at most round(rho * r)")
    tau: float = Field(0.99, gt=0.0, lt=1.0, description="cosine at which a component counts as converged")
    label_mask: bool = True
    whiten: bool = False
    max_batches: int = Field(64, ge=1)


@dataclass
class PCA:
    """Incremental PCA with k components (Ross et al. 2008): mean (d,), components (k, d), singular values (k,)."""

    k: int
    count: int = 0
    mean: Tensor | None = None
    total: Tensor | None = None  # sum of squared deviations, (d,)
    components: Tensor | None = None
    singular: Tensor | None = None
    converged: int = 0

    def update(self, x: Tensor, tau: float) -> None:
        """Rows x (n, d), n >= k."""
        n, mean = x.shape[0], x.mean(0)
        centred = x - mean
        if self.components is None:
            stack, self.mean, self.total = centred, mean, centred.square().sum(0)
        else:
            shift = (self.mean - mean) * (self.count * n / (self.count + n)) ** 0.5
            stack = torch.cat([self.singular[:, None] * self.components, centred, shift[None]])
            self.total = self.total + centred.square().sum(0) + shift.square()
            self.mean = (self.mean * self.count + mean * n) / (self.count + n)
        self.count += n
        _, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        before, self.components, self.singular = self.components, Vh[: self.k], S[: self.k]
        if before is not None:
            near = (before * self.components).sum(1).abs() >= tau
            self.converged = int(near.long().cumprod(0).sum())

    @property
    def ratio(self) -> Tensor:
        """Explained-variance ratio of each component, (k,)."""
        return self.singular.square() / self.total.sum()


@register("initializer", "eva", config=EVA, title="EVA: Explained Variance Adaptation", paper="2410.07170",
          summary="A from the principal directions of the inputs on your data, rank moved to where it explains most",
          bibtex="@article{paischer2024eva, title={One Initialization to Rule them All: Fine-tuning via Explained Variance "
                 "Adaptation}, author={Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and Alkin, Benedikt and "
                 "Deisenroth, Marc Peter and Hochreiter, Sepp}, journal={arXiv:2410.07170}, year={2024}}")
class EVAInitializer(ActivationPass):
    def maximum(self, r: int) -> int:
        return round(self.config.rho * r)

    def plan(self, sites, config):
        return {s.name: min(self.maximum(config.r), s.in_features) for s in sites} if self.config.rho > 1 else {}

    def statistics(self, model, sites, config, batches):
        """{site: its PCA}; sites with the same input share one object."""
        super().statistics(model, sites, config, batches)
        kept, shared, done = [], {}, set()
        pcas = {s.name: PCA(min(self.maximum(config.r), s.in_features)) for s in sites}
        modules = {}
        for site in sites:
            modules.setdefault(site.module_name, []).append(site.name)
        source = iter(batches)
        with self.evaluating(model):
            for i in range(self.config.max_batches):
                batch = next(source, None)
                if batch is None and not kept:
                    raise UsageError("eva got no batch to look at", remedy="give data with at least one batch")
                batch = batch if batch is not None else kept[i % len(kept)]
                kept.append(batch) if i == len(kept) else None
                self._update({m: s for m, s in modules.items() if m not in done}, pcas, shared, batch, model, first=i == 0)
                wanted = self._counts(sites, pcas, config.r)
                if wanted is not None:  # judged anew each time: what a site needs moves with the others
                    done = {m for m, names in modules.items() if all(pcas[n].converged >= wanted[n] for n in names)}
                if len(done) == len(modules):
                    break
        missing = [s.name for s in sites if pcas[s.name].components is None]
        if missing:
            raise UsageError(f"eva saw fewer input rows than components ({self.maximum(config.r)}) at '{missing[0]}'",
                             remedy="use a larger batch_size or a smaller rank")
        return pcas

    def _update(self, modules, pcas, shared, batch, model, *, first: bool) -> None:
        mask = token_mask(batch, self.config.label_mask)
        seen: dict[int, str] = {}
        alive = []

        def reader(name: str):
            def read(x):
                if first:
                    leader = seen.setdefault(id(x), name)
                    alive.append(x)  # an id is only unique while its tensor lives
                    if leader != name:
                        for site in modules[name]:
                            pcas[site] = pcas[modules[leader][0]]
                        shared[name] = leader
                        return
                if shared.get(name) in modules:
                    return
                pca, rows = pcas[modules[name][0]], counted_rows(x, mask)
                if rows.shape[0] >= pca.k:
                    pca.update(rows.float(), self.config.tau)
                for site in modules[name][1:]:
                    pcas[site] = pca
            return read

        self.look(model, {name: reader(name) for name in modules}, batch)

    def _counts(self, sites, pcas, r: int) -> dict[str, int] | None:
        if any(pcas[s.name].components is None for s in sites):
            return None
        if self.config.rho == 1:
            return {s.name: min(r, pcas[s.name].k) for s in sites}
        pooled = sorted(((-float(v), s.name, j) for s in sites for j, v in enumerate(pcas[s.name].ratio)))
        counts = {s.name: 0 for s in sites}
        for _, name, _ in pooled[: r * len(sites)]:
            counts[name] += 1
        return counts

    def ranks(self, sites, config, statistics):
        return self._counts(sites, statistics, config.r)

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        pca = statistics[site.name]
        A = pca.components[: adapter.r]
        if self.config.whiten:
            A = A / (pca.singular[: adapter.r, None] / (pca.count - 1) ** 0.5)
        adapter.lora_A.copy_(A)
