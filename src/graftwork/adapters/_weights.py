"""Shared by the adapters that take frozen tensors from W.

What `start` takes from W is a function of W (and of the graft's seed), so the artifact does not hold it: it is taken again at
every load. It is computed in fp64 and rounded once, and singular vectors have a fixed sign, so another processor gets the
same numbers; one number per tensor is saved, and a load where they differ is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArtifactError, UsageError
from ..modeling.protocols import Product
from ..modeling.source import pristine_weight
from .base import Adapter, SiteShape

#: how far a tensor that was taken again may be from the saved one, relative to its norm
TOLERANCE = 1e-3


class FromWeight(Adapter):
    """An adapter with frozen parameters that `start` sets. `taken` names those; they are not saved."""

    restarts_on_load = True
    taken: tuple[str, ...] = ()

    def artifact_state(self):
        return {name: p for name, p in self.named_parameters() if name not in self.taken}

    def load_artifact_state(self, state):
        missing, unexpected = self.load_state_dict(state, strict=False)
        wrong = sorted({*missing} - {*self.taken}) + sorted(unexpected) + sorted({*state} & {*self.taken})
        if wrong:
            raise RuntimeError(f"missing or unexpected tensors: {', '.join(wrong)}")

    def stored_extra(self):
        return {"taken": {name: _fingerprint(self.get_parameter(name))[0] for name in self.taken}} if self.taken else None

    def check_extra(self, extra):
        for name in self.taken:
            now, size = _fingerprint(self.get_parameter(name))
            self.refuse_if_apart(name, now, extra["taken"][name], size)

    def refuse_if_apart(self, what: str, now: float, saved: float, size: float) -> None:
        if not abs(now - saved) <= TOLERANCE * size:
            raise ArtifactError(f"'{self.site_name}': {what}, taken from the frozen weight, is not what it was in training",
                                remedy="load the base from its own files, in the storage it was trained on")


def _fingerprint(tensor: Tensor) -> tuple[float, float]:
    """(projection on a fixed pattern, norm): a sign that flipped in any row moves the first by about that row's norm."""
    flat = tensor.detach().double().cpu().flatten()
    pattern = torch.arange(flat.numel(), dtype=torch.float64).mul(1.7).cos()
    return float(f"{float(flat @ pattern):.9g}"), float(flat.norm())


def weight_of(product: Product, pristine: Callable[[], Tensor]) -> Tensor:
    """W (out, in) in fp64: as it is in the model's file, or, where a stored weight has no file, as it computes."""
    try:
        weight = pristine()
    except UsageError:
        weight = product.dense().detach()
    return weight.to(product.device, torch.float64)


def weight_of_site(site: Any) -> Tensor:
    """`weight_of` a site that `find_sites` gave."""
    return weight_of(site.product, lambda: pristine_weight(site.model, site))


def check_rank(method: str, site: SiteShape, r: int, most: int | None = None, *, other: str = "another r for this site with "
               "rank_pattern") -> None:
    """Raises UsageError where W has no r components of the kind the method takes (most: their number; else the rank that W can
    have). other: what helps beside a smaller r."""
    most = min(site.in_features, site.out_features) if most is None else most
    if r > most:
        raise UsageError(f"{method}: r={r}, but '{site.name}' ({site.out_features} x {site.in_features}) allows {most}",
                         remedy=f"choose r <= {most}, or {other}")


def principal(W: Tensor, r: int, svd: Literal["fast", "exact"], niter: int,
              generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, r), S (r,), Vh (r, in)) of the r largest singular values of W (out, in), in W's dtype. The largest entry of each
    right vector is positive. fast: randomized (Halko et al. 2011) with niter power iterations."""
    if svd == "exact":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        k = min(r + 8, *W.shape)
        Q = torch.linalg.qr(W @ torch.randn(W.shape[1], k, generator=generator, dtype=W.dtype).to(W.device)).Q
        for _ in range(niter):
            Q = torch.linalg.qr(W @ (W.T @ Q)).Q
        U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        U = Q @ U
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    sign = torch.where(Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(W.dtype)
    return U * sign.T, S, Vh * sign
