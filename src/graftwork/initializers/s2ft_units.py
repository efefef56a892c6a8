"""Which units S2FT trains, chosen by data (arXiv 2412.06289, the variants -A, -S and -G).

One number for each line of a site's matrix W (out, in), over all tokens of the first `batches` batches:

    activations   a = root of the mean of x_j^2 (columns) or of y_i^2, y = W x without the bias (rows)         S2FT-A
    product       a |W[:, j]| or a |W[i, :]|                                                                   S2FT-S
    gradients     |G[:, j]| or |G[i, :]|,  G = mean over the batches of dL/dW (see _gradients.py)              S2FT-G

A unit's score is the root of the sum of squares over its lines; the largest or (pick: small) the smallest scores of a role win,
as many as the adapter's ratio says. Tokens count where the label mask (labels) or the attention mask lets them. The adapter starts
at zero all the same, so the function is unchanged.

The card of the paper names the variants and no norm: Euclidean norms are ours. Experts of a mixture have no inputs of their own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..errors import UsageError
from ..modeling.coupling import units_of
from ..modeling.state import state_of
from ..registry import MethodConfig, lookup, register
from ._activations import ActivationPass, counted_rows, token_mask
from ._gradients import GradientPass
from .base import Initializer

BIBTEX = ("@inproceedings{yang2024s2ft, title={S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity}, "
          "author={Yang, Xinyu and Leng, Jixuan and Guo, Geyang and Zhao, Jiawei and Nakada, Ryumei and Zhang, Linjun and Yao, "
          "Huaxiu and Chen, Beidi}, booktitle={NeurIPS}, year={2024}}")


class S2FTGradients(MethodConfig):
    """Options of `s2ft_gradients`."""

    pick: Literal["large", "small"] = "large"
    batches: int = Field(8, ge=1)


class S2FTActivations(S2FTGradients):
    """Options of `s2ft_activations`."""

    score: Literal["activations", "product"] = "activations"
    label_mask: bool = Field(False, description="count tokens that are trained, instead of all that are no padding")


class UnitChoice(Initializer):
    """Sets the lines of each site from a pass that gives their squares."""

    methods = ("s2ft",)

    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if config.selection != "random":
            raise UsageError(f"{self.method} chooses the units, and so does adapter.selection: {config.selection}",
                             remedy="adapter.selection: random, or initializer: default")

    def chosen(self, sites, config, squares):
        """{site: lines} from {site: squares of its lines}."""
        cls = lookup("adapter", config.method).cls
        scores = {site.name: cls.unit_scores(site, squares[site.name]) for site in sites}
        return {name: lines for name, (_, lines) in cls.choose(sites, config, 0, scores, small=self.config.pick == "small").items()}

    def build(self, site, product, adapter, statistics, generator):
        adapter.take(statistics[site.name], product.device)


@register("initializer", "s2ft_gradients", config=S2FTGradients, paper="2412.06289", bibtex=BIBTEX,
          title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
          summary="the units of S2FT with the largest or smallest gradients on your data")
class S2FTGradientsInitializer(UnitChoice, GradientPass):
    def statistics(self, model, sites, config, batches):
        """{site: lines}."""
        gradients, squares = super().statistics(model, sites, config, batches), {}
        for site in sites:
            G = gradients[site.module_name] if site.rows is None else gradients[site.module_name][site.rows]
            squares[site.name] = G.double().square().sum(0 if units_of(site).axis == "columns" else 1)
        return self.chosen(sites, config, squares)


@register("initializer", "s2ft_activations", config=S2FTActivations, paper="2412.06289", bibtex=BIBTEX,
          title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
          summary="the units of S2FT with the largest or smallest activations (times weights) on your data")
class S2FTActivationsInitializer(UnitChoice, ActivationPass):
    def statistics(self, model, sites, config, batches):
        """{site: lines}."""
        super().statistics(model, sites, config, batches)
        sums, counts, holder = {}, {}, state_of(model)
        by_module: dict[str, list] = {}
        for site in sites:
            by_module.setdefault(site.module_name, []).append(site)
        with self.evaluating(model), holder.scope(disabled=holder.current.disabled | set(holder.grafts)):
            for _, batch in zip(range(self.config.batches), batches):
                self._update(model, by_module, sums, counts, batch)
        missing = [s.name for s in sites if not counts.get(s.name)]
        if missing:
            raise UsageError(f"{self.method} saw no token at '{missing[0]}'", remedy="give data with at least one batch")
        squares = {s.name: sums[s.name] / counts[s.name] for s in sites}
        if self.config.score == "product":
            for site in sites:
                W = self.pristine(site).double()
                squares[site.name] = squares[site.name] * W.square().sum(0 if units_of(site).axis == "columns" else 1).cpu()
        return self.chosen(sites, config, squares)

    def _update(self, model, by_module, sums, counts, batch) -> None:
        mask = token_mask(batch, self.config.label_mask)

        def reader(sites):
            def read(x):
                for site in sites:
                    rows = counted_rows(x if units_of(site).axis == "columns" else site.product.product(x), mask)
                    sums[site.name] = sums.get(site.name, 0.0) + rows.double().square().sum(0).cpu()
                    counts[site.name] = counts.get(site.name, 0) + rows.shape[0]
            return read

        self.look(model, {name: reader(of) for name, of in by_module.items()}, batch)
