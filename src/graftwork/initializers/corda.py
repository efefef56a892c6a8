"""CorDA: context-oriented decomposition adaptation (arXiv 2406.05223). Like PiSSA, but the components of W are ordered by what
the inputs of some data make of them.

    C (in, in) = mean over samples of X^T X,  X (tokens, in) the site's inputs / max |X|      C += damp mean(diag C) I
    U S V^T = SVD(W C),   W = U S V^T C^-1        k = the first r components (ipm) or the last r (kpm)
    B = U_k sqrt(S_k / s) (out, r)     A = sqrt(S_k / s) V_k^T C^-1 (r, in)     base used: W - s B0 A0, so y is unchanged

ipm, instruction-previewed: data of the task; the adapter starts as the rank-r part that matters most to it, the one that
minimizes |(W - s B A) C|. kpm, knowledge-preserved: data of what is to be kept (questions and answers about facts, say); the
adapter takes the part that matters least to it and the rest stays frozen. In a recipe `data` names that file (default: the
training data); `attach` takes it as `batches`. The base is kept or, where it is quantized, only the residual is quantized, as
with `pissa`; so is the export, a LoRA of rank 2r on the pristine base. All unpadded tokens of the first `samples` rows count.

Differs from the official code and PEFT's: the base is not overwritten; products and factorizations are in float64, where C with
its damping is never too close to singular (condition at most about in / damp), so the damping is not doubled until an
inverse succeeds, and no inverse is formed; samples are scaled by their largest magnitude (there, by the magnitude of their
largest value, which a sample of negative values makes tiny); sites that read one tensor share one C.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..registry import MethodConfig, register
from ._activations import ActivationPass, token_mask
from .base import requantizable
from .pissa import PiSSAInitializer


class CorDA(MethodConfig):
    """Options of `corda`."""

    mode: Literal["ipm", "kpm"] = Field("ipm", description="ipm: adapt what matters most to the data; kpm: keep it, adapt the rest")
    samples: int = Field(256, ge=1, description="rows of data to look at")
    damp: float = Field(0.01, gt=0.0, description="added to C's diagonal, relative to its mean")
    data: str | None = Field(None, description="file whose rows a recipe's run looks at; default: the training data")


class Covariance:
    """Sum over samples of X^T X (in, in), fp32, and their number."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor, mask: Tensor | None) -> None:
        """x (N, T, in), or (T, in) of one sample; mask (N, T): which tokens count."""
        x = x.float() if x.dim() == 3 else x.float().reshape(1, -1, x.shape[-1])
        if mask is not None and mask.shape == x.shape[:2]:
            x = x * mask[..., None].to(x.dtype)
        x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        rows = x.reshape(-1, x.shape[-1])
        self.total = rows.T @ rows if self.total is None else self.total.addmm_(rows.T, rows)
        self.count += x.shape[0]

    def damped(self, damp: float) -> Tensor | None:
        """C in float64; None where no input was ever other than zero."""
        if self.total is None:
            return None
        C = self.total.double() / self.count
        mean = C.diagonal().mean()
        C.diagonal().add_(damp * mean)
        return C if bool(mean > 0) else None


@register("initializer", "corda", config=CorDA, paper="2406.05223", edits_base=True,
          title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient "
                "Fine-tuning",
          summary="start from the part of W that matters most (or least) to the inputs of your data",
          bibtex="@inproceedings{yang2024corda, title={CorDA: Context-Oriented Decomposition Adaptation of Large Language Models "
                 "for Task-Aware Parameter-Efficient Fine-tuning}, author={Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and "
                 "Song, Shuaiwen Leon and Wu, Jianlong and Nie, Liqiang and Ghanem, Bernard}, booktitle={NeurIPS}, year={2024}}")
class CorDAInitializer(ActivationPass, PiSSAInitializer):
    def statistics(self, model, sites, config, batches):
        """{module: its Covariance}; modules with the same input share one object."""
        super().statistics(model, sites, config, batches)
        found: dict[str, Covariance] = {}
        names, left = list(dict.fromkeys(s.module_name for s in sites)), self.config.samples
        with self.evaluating(model):
            for batch in batches:
                batch = {k: v[:left] if isinstance(v, Tensor) else v for k, v in batch.items()}
                self._update(model, names, found, batch)
                left -= batch["input_ids"].shape[0]
                if left <= 0:
                    break
        return found

    def _update(self, model, names: list[str], found: dict[str, Covariance], batch: dict) -> None:
        first, seen, alive = not found, {}, []
        counted: set[int] = set()

        def reader(name: str):
            def read(x):
                if first:
                    alive.append(x)  # an id is only unique while its tensor lives
                    found[name] = seen.setdefault(id(x), Covariance())
                own = found[name]
                if id(own) not in counted:
                    counted.add(id(own))
                    own.update(x, token_mask(batch))
            return read

        self.look(model, {name: reader(name) for name in names}, batch)

    @torch.no_grad()
    def build(self, site, product, adapter, statistics, generator):
        if adapter.r > min(site.in_features, site.out_features):
            raise UsageError(f"corda takes {adapter.r} components of '{site.name}', which has "
                             f"{min(site.in_features, site.out_features)}", remedy="use a smaller rank")
        seen = statistics.get(site.module_name)
        C = None if seen is None else seen.damped(self.config.damp)
        if C is None:
            raise UsageError(f"corda saw no input of '{site.name}'", remedy="give data that reaches it, or leave it out of "
                             "adapter.target_modules")
        stored = requantizable(site)
        W = (self.pristine(site) if stored else product.dense().detach()).to(C)
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        kept = slice(0, adapter.r) if self.config.mode == "ipm" else slice(S.shape[0] - adapter.r, S.shape[0])
        root = (S[kept] / adapter.scale).sqrt()
        adapter.lora_B.copy_(U[:, kept] * root)
        adapter.lora_A.copy_(torch.linalg.solve(C, Vh[kept].T * root).T)
        B0, A0 = adapter.lora_B.detach() * adapter.scale, adapter.lora_A.detach().clone()
        adapter.set_pair(B0, A0, in_storage=stored)
        return self.quantize(site, W.float() - (B0 @ A0).to(W.device)) if stored else None
