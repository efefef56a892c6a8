"""A bottleneck network beside or behind a linear map: what the methods with a non-linear change share.

    position serial:    y' = y + s (U act(D y + b_D) + b_U)        y = W x + b, the output of the site; D (r, out), U (out, r)
    position parallel:  y' = y + s (U act(D x + b_D) + b_U)        x, the input of the site; D (r, in), U (out, r)

Rows of different adapters: one product with W for all rows, then two batched products. The adapters of a bank may differ in rank,
activation and position: ranks are padded with zeros, an activation is chosen per row, and D is kept in two tensors of
which one is zero. An activation need not map 0 to 0 for that, because the columns of U are padded too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..modeling.arithmetic import linear, product_dtype
from .base import Adapter, as_rows, pattern_value

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}
ACTIVATION_PATTERN = f"^({'|'.join(ACTIVATIONS)})$"


@dataclass
class BottleneckBank:
    """K adapters of one site in the compute dtype: serial (K, r, out) and parallel (K, r, in) down maps, either None where
    no adapter has it; down_bias (K, r); up (K, out, r) and up_bias (K, out) with the scale folded in; activation (K,)."""

    serial: Tensor | None
    parallel: Tensor | None
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Tensor
    names: tuple[str, ...]  # the activations that occur, by their number in `activation`

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.serial, self.parallel, self.down_bias, self.up, self.up_bias)
                   if t is not None)


class SerialAdapter(Adapter):
    """Base of such methods. A method sets `r`, `activation`, `reads`, `scale` and gives its weights by `weights`."""

    multiplicative = True  # a serial network reads the finished output, so it cannot be one term of a sum
    r: int
    activation: str
    reads: str  # serial | parallel
    scale: float

    @staticmethod
    def width(site, config) -> int:
        """Width of what the network reads."""
        return site.out_features if config.position == "serial" else site.in_features

    @classmethod
    def rank_of(cls, site, config) -> int:
        """The rank at this site. Raises UsageError when the network would be no bottleneck."""
        r = pattern_value(config.rank_pattern, site.name, config.r)
        room = min(cls.width(site, config), site.out_features)
        if r > room:
            raise UsageError(f"{cls.method}: r={r} is no bottleneck, '{site.name}' reads {cls.width(site, config)} and writes "
                             f"{site.out_features} values",
                             remedy=f"choose r <= {room}, or another r for this site with rank_pattern")
        return r

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(D (r, width), b_D (r,) or None, U (out, r), b_U (out,) or None) as they act, without the scale."""
        raise NotImplementedError

    def forward(self, x, base):
        y = base(x)
        down, down_bias, up, up_bias = self.weights()
        z = y if self.reads == "serial" else x
        hidden = linear(z, down.to(z.dtype), None if down_bias is None else down_bias.to(z.dtype))
        change = linear(ACTIVATIONS[self.activation](hidden), up.to(z.dtype), None if up_bias is None else up_bias.to(z.dtype))
        return y + (change if self.scale == 1.0 else change * self.scale)

    # -- many rows -----------------------------------------------------------------------------------------------------
    @classmethod
    def stack(cls, adapters: Sequence[SerialAdapter], dtype):
        rank = max(a.r for a in adapters)
        parts = [a.weights() for a in adapters]
        dtype = product_dtype(dtype, parts[0][0].device)
        names = tuple(dict.fromkeys(a.activation for a in adapters))

        def down(position: str) -> Tensor | None:
            """The down maps of one position; zeros for adapters of the other."""
            width = next((p[0].shape[1] for a, p in zip(adapters, parts) if a.reads == position), None)
            return None if width is None else torch.stack([
                F.pad(p[0], (0, 0, 0, rank - a.r)) if a.reads == position else p[0].new_zeros(rank, width)
                for a, p in zip(adapters, parts)]).to(dtype)

        return BottleneckBank(
            down("serial"), down("parallel"),
            torch.stack([p[0].new_zeros(rank) if p[1] is None else F.pad(p[1], (0, rank - a.r))
                         for a, p in zip(adapters, parts)]).to(dtype),
            torch.stack([F.pad(p[2] * a.scale, (0, rank - a.r)) for a, p in zip(adapters, parts)]).to(dtype),
            torch.stack([p[0].new_zeros(a.out_features) if p[3] is None else p[3] * a.scale
                         for a, p in zip(adapters, parts)]).to(dtype),
            torch.tensor([names.index(a.activation) for a in adapters], device=parts[0][0].device), names)

    @classmethod
    def rows_inputs(cls, bank, index, x):
        return x

    @classmethod
    def rows_combine(cls, bank, index, z, x, base):
        y = as_rows(z).to(bank.up.dtype)
        full = y if base.bias is None else y + base.bias.to(y.dtype)
        hidden = bank.down_bias.index_select(0, index).unsqueeze(1)
        for maps, read in ((bank.serial, full), (bank.parallel, as_rows(x).to(bank.up.dtype))):
            if maps is not None:
                hidden = hidden + torch.bmm(read, maps.index_select(0, index).transpose(1, 2))
        chosen = bank.activation.index_select(0, index).view(-1, 1, 1)
        acted = ACTIVATIONS[bank.names[0]](hidden)
        for number, name in enumerate(bank.names[1:], 1):
            acted = torch.where(chosen == number, ACTIVATIONS[name](hidden), acted)
        change = torch.baddbmm(bank.up_bias.index_select(0, index).unsqueeze(1), acted,
                               bank.up.index_select(0, index).transpose(1, 2))
        return (y + change).to(z.dtype).reshape(z.shape)
