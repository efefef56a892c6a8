"""SST: train the weight in the coordinates of its own SVD, a few singular pairs at a time (arXiv 2405.15481).

    W = U diag(sigma) V,   U (out, a), V (a, in), sigma (a,),   a = min(out, in), at the start the SVD of the weight as it computes
    y = U (sigma * (V x)) + b,   where the pairs of `columns` (r,) are read from u (out, r) and v (r, in), which train; sigma trains whole

    d sigma = sum_t (U^T g_t) * (V x_t)          as autograd has it
    d u_i = sum_t g_t (v_i x_t) = G v_i^T        autograd's without its factor sigma_i: the enhanced gradient, so that pairs of
    d v_i = sum_t (u_i^T g_t) x_t^T = u_i^T G    small singular values learn too;  G = dL/dW (out, in) is never formed

Selection `sst` draws the columns anew, keeps u_i and v_i at unit norm and sigma >= 0, and decomposes again; without it the first draw
would train for ever and lose its norm, so recipes refuse the one without the other. The columns start from the same draw,
p(i) = (1/a + sigma_i / sum sigma) / 2 without replacement. Trained values a + r (out + in); kept beside them: U and V.

What it saves are gradients and optimizer state. Not the weight: U and V have (out + in) a values, up to twice W, and the frozen W
stays in the base for other grafts and for `disabled`; a forward costs two full products where W costs one. The artifact holds
sigma, U, V and the columns, so it is whole without the base's W. Kept for the backward pass: x and V x.

Differs from the paper: the active pairs are tensors of their own instead of swapped segments, so that any optimizer's state
covers r pairs and no more. The hyperbolic layers are left out.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.arithmetic import product_dtype
from ..registry import register
from ._replaced import Replaced
from ._three_factor import frozen
from ._weights import check_rank, principal
from .base import AdapterConfig, pattern_value


class SST(AdapterConfig):
    """Options of `sst`."""

    r: int = Field(64, ge=1, description="singular pairs that train at a time")
    rank_pattern: dict[str, int] = {}


def drawn(sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """r distinct indices, sorted, int32: one after the other from p(i) = (1/a + sigma_i / sum sigma) / 2 of those that are left."""
    a = sigma.shape[0]
    sigma = sigma.detach().double().clamp(min=0.0)
    p = 0.5 / a + 0.5 * sigma / sigma.sum().clamp(min=1e-300)
    arrival = -torch.rand(a, dtype=torch.float64, generator=generator).log().to(sigma.device) / p  # of processes with rates p
    return arrival.topk(r, largest=False).indices.sort().values.to(torch.int32)


def _spectral(x: Tensor, sigma: Tensor, u: Tensor, v: Tensor, U: Tensor, V: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(y (T, out), h = V x (T, a) with the active pairs), both in the dtype of x (T, in)."""
    U, V, u, v, sigma = (each.to(x.dtype) for each in (U, V, u, v, sigma))
    own = x @ v.T
    h = (x @ V.T).index_copy(1, columns, own)
    y = (h * sigma.index_fill(0, columns, 0.0)) @ U.T
    return y + (own * sigma.index_select(0, columns)) @ u.T, h


class _Spectral(torch.autograd.Function):
    """`_spectral` with the enhanced gradient; U, V and columns get none."""

    @staticmethod
    def forward(ctx, x, sigma, u, v, U, V, columns):
        y, h = _spectral(x, sigma, u, v, U, V, columns)
        ctx.save_for_backward(x, h, sigma, u, v, U, V, columns)
        return y

    @staticmethod
    def backward(ctx, g):
        x, h, sigma, u, v, U, V, columns = ctx.saved_tensors
        wide = [each.to(g.dtype) for each in (sigma, u, v, U, V)]
        s, own = wide[0], g @ wide[1]  # (T, r)
        dx = ds = du = dv = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            t = (g @ wide[3]).index_copy(1, columns, own)  # U^T g (T, a)
            ds = (t * h).sum(0).to(sigma.dtype)
            dx = (t * s.index_fill(0, columns, 0.0)) @ wide[4] + (own * s.index_select(0, columns)) @ wide[2]
        if ctx.needs_input_grad[2]:
            du = (g.T @ h.index_select(1, columns)).to(u.dtype)
        if ctx.needs_input_grad[3]:
            dv = (own.T @ x).to(v.dtype)
        return dx if ctx.needs_input_grad[0] else None, ds, du, dv, None, None, None


@register("adapter", "sst", config=SST, title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
          paper="2405.15481", summary="trains the weight's SVD: all singular values, and r singular pairs at a time",
          bibtex="@inproceedings{zhao2025sparse, title={Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural "
                 "Networks}, author={Zhao, Jialin and Zhang, Yingtao and Li, Xinghang and Liu, Huaping and Cannistraci, Carlo "
                 "Vittorio}, booktitle={ICML}, year={2025}}",
          selection="sst")
class SSTAdapter(Replaced):
    moves = ("U", "V", "columns")

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r, self.modes = pattern_value(config.rank_pattern, site.name, config.r), min(site.in_features, site.out_features)
        check_rank("sst", site, self.r)
        self.sigma = nn.Parameter(torch.zeros(self.modes))
        self.u, self.v = nn.Parameter(torch.zeros(site.out_features, self.r)), nn.Parameter(torch.zeros(self.r, site.in_features))
        self.U, self.V = frozen(site.out_features, self.modes), frozen(self.modes, site.in_features)
        self.columns = nn.Parameter(torch.arange(self.r, dtype=torch.int32), requires_grad=False)

    @classmethod
    def parameter_count(cls, site, config):
        r = pattern_value(config.rank_pattern, site.name, config.r)
        return min(site.in_features, site.out_features) + r * (site.in_features + site.out_features)

    def start(self, product, pristine, generator):
        self._decompose(product.dense().detach().double())
        self._activate(drawn(self.sigma, self.r, generator))

    def parameter_groups(self):
        """Decay would only shorten u and v, which are brought back to unit norm."""
        return [{"params": [p for p in (self.sigma,) if p.requires_grad], "lr_scale": 1.0},
                {"params": [p for p in (self.u, self.v) if p.requires_grad], "lr_scale": 1.0, "weight_decay": 0.0}]

    # -- applied -----------------------------------------------------------------------------------------------------
    def product(self, x):
        rows = x.reshape(-1, self.in_features).to(product_dtype(x.dtype, x.device))
        tensors = (rows, self.sigma, self.u, self.v, self.U, self.V, self.columns.long())
        y = _Spectral.apply(*tensors) if torch.is_grad_enabled() else _spectral(*tensors)[0]  # plain: forward-mode tangents pass
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def weight(self):
        U, V = self._whole()
        return (U * self.sigma.detach()) @ V

    def _whole(self) -> tuple[Tensor, Tensor]:
        """U and V with the active pairs in their places."""
        at = self.columns.long()
        return self.U.detach().index_copy(1, at, self.u.detach()), self.V.detach().index_copy(0, at, self.v.detach())

    # -- what the selection does ---------------------------------------------------------------------------------------
    @torch.no_grad()
    def redraw(self, generator: torch.Generator, *, decompose: bool) -> None:
        """Put the active pairs back, decompose the weight again if asked to, and draw r others."""
        at = self.columns.long()
        self.U.index_copy_(1, at, self.u)
        self.V.index_copy_(0, at, self.v)
        if decompose:
            self._decompose((self.U.double() * self.sigma.double()) @ self.V.double())
        self._activate(drawn(self.sigma, self.r, generator))

    @torch.no_grad()
    def constrain(self) -> None:
        """u_i and v_i back to unit norm, sigma back to >= 0."""
        self.u.div_(torch.linalg.vector_norm(self.u, dim=0, keepdim=True).clamp(min=1e-12))
        self.v.div_(torch.linalg.vector_norm(self.v, dim=1, keepdim=True).clamp(min=1e-12))
        self.sigma.clamp_(min=0.0)

    def _decompose(self, W: Tensor) -> None:
        """The SVD of W (out, in). The i-th largest value takes the place of the i-th largest of before: sigma's moments stay there."""
        U, S, V = principal(W, self.modes, "exact", 0, None)
        places = torch.argsort(self.sigma.detach(), descending=True, stable=True)
        self.sigma.index_copy_(0, places, S.to(self.sigma.dtype))
        self.U.index_copy_(1, places, U.to(self.U.dtype))
        self.V.index_copy_(0, places, V.to(self.V.dtype))

    def _activate(self, columns: Tensor) -> None:
        self.columns.copy_(columns)
        self.u.copy_(self.U.index_select(1, columns.long()))
        self.v.copy_(self.V.index_select(0, columns.long()))

    # -- saved: each pair once -------------------------------------------------------------------------------------------
    def artifact_state(self):
        U, V = self._whole()
        return {"sigma": self.sigma, "U": U, "V": V, "columns": self.columns}

    def load_artifact_state(self, state):
        if state.keys() != {"sigma", "U", "V", "columns"}:
            raise RuntimeError(f"missing or unexpected tensors: {', '.join(sorted({'sigma', 'U', 'V', 'columns'} ^ {*state}))}")
        at = state["columns"].long()
        if at.shape != (self.r,) or at.min() < 0 or at.max() >= self.modes or len(at.unique()) != self.r:
            raise RuntimeError(f"columns must be {self.r} different numbers below {self.modes}")
        self.load_state_dict({**state, "u": state["U"].index_select(1, at), "v": state["V"].index_select(0, at)})
