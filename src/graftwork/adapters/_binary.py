"""Weights kept in 1, 2 or 4 bits: trained through the quantizer, stored as codes and two numbers (arXiv 2307.16867).

    mu = mean(w), sigma = std(w) (unbiased), z = (w - mu) / (sigma + 1e-5), w^ = q(z) sigma + mu
    q(z): the nearest of 2^b levels. Straight through for q alone: dq/dz = 1, so gradients also reach mu and sigma.

The levels minimise E|z - q(z)| for z ~ N(0, 1): each is the Gaussian median of its interval, each boundary the middle of two
levels. Stored for each tensor: codes, 8/b in a byte, the first in the lowest bits, the last byte filled with zeros; and
mu, sigma in fp32. Bytes: ceil(numel b / 8) + 8.

A loaded tensor stays packed and is unpacked where it is used. To go on training it needs values again (`resume`): mu + sigma
(q - mean q) / std q, which has the stored mean and deviation; it quantizes to the stored codes as long as the
codes are spread about as those of a Gaussian, which one affine map of the levels then does not carry over a boundary.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor, nn

EPS = 1e-5


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, ascending."""
    normal, count = NormalDist(), 2**bits
    found = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(10_000):
        edges = [0.0, *(normal.cdf((a + b) / 2) for a, b in zip(found, found[1:])), 1.0]
        better = [normal.inv_cdf((a + b) / 2) for a, b in zip(edges, edges[1:])]
        moved = max(abs(a - b) for a, b in zip(found, better))
        found = better
        if moved < 1e-12:
            break
    return tuple(found)


def table(bits: int, like: Tensor) -> Tensor:
    return torch.tensor(levels(bits), dtype=like.dtype, device=like.device)


def standardize(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mu, sigma) of w."""
    mu, sigma = w.mean(), w.std()
    return (w - mu) / (sigma + EPS), mu, sigma


def encode(z: Tensor, bits: int) -> Tensor:
    """Codes (int64) of z: the number of boundaries below it."""
    places = table(bits, z)
    return torch.bucketize(z, (places[1:] + places[:-1]) / 2)


def quantize(w: Tensor, bits: int) -> Tensor:
    """w^, differentiable."""
    z, mu, sigma = standardize(w)
    q = table(bits, z)[encode(z.detach(), bits)]
    return (z + (q - z).detach()) * sigma + mu


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape) as bytes (ceil(numel bits / 8),) uint8."""
    each = 8 // bits
    flat = nn.functional.pad(codes.flatten(), (0, -codes.numel() % each)).view(-1, each)
    return (flat << (torch.arange(each, device=codes.device) * bits)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The inverse of `pack`: int64 codes of that shape."""
    each = 8 // bits
    codes = (packed.long().unsqueeze(1) >> (torch.arange(each, device=packed.device) * bits)) & (2**bits - 1)
    return codes.flatten()[: shape.numel()].view(shape)


def stored_bytes(numel: int, bits: int) -> int:
    return math.ceil(numel * bits / 8) + 8


class BinaryWeights(nn.Module):
    """Mixed into an adapter: tensors that are trained through the quantizer and stored packed."""

    bits: int
    shapes: dict[str, torch.Size]

    def keep(self, bits: int, **latent: Tensor) -> None:
        """Names and starting values of the tensors."""
        self.bits, self.shapes = bits, {name: value.shape for name, value in latent.items()}
        for name, value in latent.items():
            self.register_parameter(name, nn.Parameter(value))
            self.register_parameter(f"{name}_codes", None)
            self.register_parameter(f"{name}_stats", None)

    def weight(self, name: str) -> Tensor:
        """The tensor as it acts, fp32."""
        latent = getattr(self, name)
        if latent is not None:
            return quantize(latent, self.bits)
        mu, sigma = getattr(self, f"{name}_stats")
        codes = unpack(getattr(self, f"{name}_codes"), self.bits, self.shapes[name])
        return table(self.bits, sigma)[codes] * sigma + mu

    @torch.no_grad()
    def artifact_state(self) -> dict[str, Tensor]:
        state = {}
        for name in self.shapes:
            latent, codes, stats = (getattr(self, key) for key in (name, f"{name}_codes", f"{name}_stats"))
            if latent is not None:
                z, mu, sigma = standardize(latent.float())
                codes, stats = pack(encode(z, self.bits), self.bits), torch.stack([mu, sigma])
            state[f"{name}_codes"], state[f"{name}_stats"] = codes, stats
        return state

    def load_artifact_state(self, state: dict[str, Tensor]) -> None:
        device = next(self.parameters()).device
        for name, shape in self.shapes.items():
            size = stored_bytes(shape.numel(), self.bits) - 8
            setattr(self, name, None)
            setattr(self, f"{name}_codes", nn.Parameter(torch.zeros(size, dtype=torch.uint8, device=device), requires_grad=False))
            setattr(self, f"{name}_stats", nn.Parameter(torch.zeros(2, device=device), requires_grad=False))
        self.load_state_dict(state)

    @torch.no_grad()
    def resume(self) -> None:
        for name, shape in self.shapes.items():
            if getattr(self, name) is None:
                mu, sigma = getattr(self, f"{name}_stats")
                q = table(self.bits, sigma.double())[unpack(getattr(self, f"{name}_codes"), self.bits, shape)]
                setattr(self, name, nn.Parameter((mu + sigma * (q - q.mean()) / q.std()).float()))
                setattr(self, f"{name}_codes", None), setattr(self, f"{name}_stats", None)


def small_normal(*shape: int, generator: torch.Generator) -> Tensor:
    """N(0, 0.001) cut at two deviations: the start of the outer map. Zero is none, since a quantizer of zeros has no scale."""
    uniform = torch.rand(shape, generator=generator) * 2 - 1  # the inverse of the distribution: no rejection, which reads values
    return 1e-3 * 2**0.5 * torch.erfinv(uniform * math.erf(2**0.5))
