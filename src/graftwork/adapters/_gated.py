"""Low-rank adapters with one gate per rank, for methods that move ranks between sites while training.

    y = W x + b + s B (g * (A dropout(x))),   A (rows, in), g (rows,), B (out, rows),   s = alpha / r

r is the rank of the config and fixes s for good; how many rows there are may change (`resize`), the function does not. A
parameter object is never replaced, its `.data` is, so lists of parameters and optimizer groups stay valid. Rows whose gate is
exactly zero are left out of an artifact.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from ..modeling.protocols import has_values
from ._lowrank import frozen_plus_low_rank
from ._weights import check_rank
from .base import Adapter, AdapterConfig


class GatedConfig(AdapterConfig):
    """Options of every gated adapter."""

    r: int = Field(8, ge=1, description="rank at the start")
    alpha: float | None = Field(None, description="scale numerator; default r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class SiteCount(nn.Module):
    """How many sites a graft has, for terms that are means over them; nothing is stored."""

    def __init__(self, sites: int):
        super().__init__()
        self.sites = sites


class GatedAdapter(Adapter):
    """Base of these adapters: a subclass sets the parameters lora_A, gate and lora_B."""

    zero_start = False  # gates are zero before training, so a site of zeros has not been pruned

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.r = config.r
        check_rank(self.method, site, self.r, other="leave this site out with exclude_modules")
        self.scale = (self.r if config.alpha is None else config.alpha) / self.r
        self.dropout = config.dropout
        self.__dict__["shared"] = shared  # not a submodule: the graft owns it

    @classmethod
    def make_shared(cls, sites, config, seed):
        return SiteCount(len(sites))

    @property
    def gates(self) -> Tensor:
        """The factor of every row, (rows,)."""
        return self.gate

    def factors(self, base=None):
        return self.lora_B * self.scale, self.lora_A * self.gates[:, None]

    def forward(self, x, base):
        if (self.dropout and self.training and torch.is_grad_enabled()) or not base.frozen.frozen:
            return super().forward(x, base)
        B, A = self.factors()
        return frozen_plus_low_rank(x, A, B, None, base.frozen)

    def off_orthogonal(self) -> Tensor:
        """|A A^T - I|_F + |B^T B - I|_F, a scalar."""
        A, B = self.lora_A, self.lora_B
        eye = torch.eye(A.shape[0], device=A.device, dtype=A.dtype)
        return (A @ A.T - eye).square().sum().sqrt() + (B.T @ B - eye).square().sum().sqrt()

    # -- rows that come and go -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def resize(self, gates: int, rows: int) -> None:
        """Make room for so many gates and rows; values are undefined afterwards."""
        self.gate.data = self.gate.new_empty(gates)
        self.lora_A.data = self.lora_A.new_empty(rows, self.in_features)
        self.lora_B.data = self.lora_B.new_empty(self.out_features, rows)

    def artifact_state(self):
        state = super().artifact_state()
        if not has_values(self.gate):
            return state
        live = self.gate.detach() != 0
        if bool(live.all()) or (self.zero_start and not bool(live.any())):
            return state
        if not bool(live.any()):
            live[0] = True  # a tensor needs a row
        return {**state, "gate": self.gate[live], "lora_A": self.lora_A[live], "lora_B": self.lora_B[:, live]}

    def load_artifact_state(self, state):
        if "gate" in state and "lora_A" in state:
            self.resize(state["gate"].shape[0], state["lora_A"].shape[0])
        super().load_artifact_state(state)
