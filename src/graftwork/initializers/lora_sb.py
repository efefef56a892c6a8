"""LoRA-SB: start from the approximated first step of full tuning (arXiv 2411.19557). For the adapter `lora_sb`.

    G = mean over `batches` batches of dL/dW  (out, in), at the pretrained weights (`_gradients`)
    D = -eta sign(G), what the first step of Adam at the rate eta does to W;   U S V^T = its r largest components
    B = U (out, r),   R = diag(S) (r, r),   A = V^T (r, in):   y = W x + B R A x, so training starts at W + U S V^T

The output is changed at the start, on purpose: an approximate full step has been taken. R is in units of eta, so it depends on the
rate; in a run eta is the rate of its first step, with warm-up, unless it is given. The sign makes D far from low-rank, and the
components hold a small share of it.

Differs from the official code: fp32 throughout (it rounds the factors to bf16), the randomized SVD draws from a private generator,
and eta is the rate that the schedule has at its first step (it divides the rate by the warm-up steps, which is that of a
schedule that reaches the full rate one step sooner).
"""

from __future__ import annotations

import torch
from pydantic import Field

from ..errors import UsageError
from ..registry import MethodConfig, register
from ._gradients import GradientPass
from .pissa import randomized_svd


class LoRASBStart(MethodConfig):
    """Options of `lora_sb`."""

    batches: int = Field(8, ge=1, description="batches of the gradient estimate; fewer if the data has fewer")
    eta: float | None = Field(None, ge=0.0, description="rate of the approximated step; default: the run's rate at its first step")
    niter: int = Field(10, ge=0, description="power iterations of the randomized SVD")


@register("initializer", "lora_sb", config=LoRASBStart, title="Initialization using Update Approximation is a Silver Bullet for "
          "Extremely Efficient Low-Rank Fine-Tuning", paper="2411.19557",
          summary="B, R and A from the first full step of Adam on your data, which is already taken at the start",
          bibtex="@article{ponkshe2024lorasb, title={Initialization using Update Approximation is a Silver Bullet for Extremely "
                 "Efficient Low-Rank Fine-Tuning}, author={Ponkshe, Kaustubh and Singhal, Raghav and Gorbunov, Eduard and "
                 "Tumanov, Alexey and Horvath, Samuel and Vepakomma, Praneeth}, journal={arXiv:2411.19557}, year={2024}}")
class LoRASBInitializer(GradientPass):
    methods = ("lora_sb",)

    def check(self, adapter, config, sites):
        super().check(adapter, config, sites)
        if self.config.eta is None:
            raise UsageError("lora_sb approximates the first step, and outside a run its rate is not known",
                             remedy="initializer: {method: lora_sb, eta: RATE}, your rate divided by your warm-up steps")

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        G, r = statistics[site.module_name], adapter.r
        step = -self.config.eta * (G if site.rows is None else G[site.rows]).to(product.device).sign()
        U, S, Vh = randomized_svd(step, r, self.config.niter, generator)
        adapter.B.copy_(U[:, :r])
        adapter.M.copy_(torch.diag(S[:r]))
        adapter.A.copy_(Vh[:r])
