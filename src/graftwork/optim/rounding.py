"""Rounding of updated 16-bit weights, and of weights that are codes, without a float32 master copy.

A weight W of bfloat16 has 8 significant bits: an update below |W| / 512 is lost when it is rounded to the nearest. Two remedies,
both on top of any rule, with x the float32 result of the update:

    stochastic  W <- up(x) with probability (x - down(x)) / (up(x) - down(x)), else down(x):  the mean of W is x
    kahan       x is computed from W + C;  W <- round(x),  C <- round(x - W):  16 significant bits for 2 more bytes a weight

Stochastic rounding keeps no state: its numbers come from a generator seeded with the parameter's place and step, so that a
resumed run draws the same. The float32 copy exists for one tensor (or one piece of a large one) at a time.

A weight that is codes (modeling.trained_codes) is read before the update and coded again after it, to the nearest code or
stochastically; a `kahan` remainder would be the master copy that such weights do without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UsageError
from ..modeling.arithmetic import round_stochastic
from ..modeling.trained_codes import codes_of

NARROW = (torch.bfloat16, torch.float16)


def check_rounding(rounding: str, p: Tensor) -> None:
    """Raises: UsageError for float16 weights under stochastic rounding, and coded ones under kahan."""
    if codes_of(p) is not None:
        if rounding == "kahan":
            raise UsageError("kahan rounding keeps a remainder as large as the weight, and these weights are codes without a copy",
                             remedy="rounding: stochastic")
        return
    if rounding == "stochastic" and p.dtype == torch.float16:
        raise UsageError("stochastic rounding works on bfloat16, whose numbers are float32's without the lower half; a parameter "
                         "is float16", remedy="rounding: kahan, or bfloat16 weights")


def noise(rounding: str, device: torch.device, place: tuple[int, int]) -> torch.Generator | None:
    """What stochastic rounding draws from, by a parameter's number and step."""
    if rounding != "stochastic":
        return None
    # Mixed into 32 bits, all that a CPU generator takes of a seed.
    return torch.Generator(device).manual_seed((place[0] * 0x9E3779B1 + place[1] * 0x85EBCA6B) & 0xFFFFFFFF)


@contextmanager
def widened(p: Tensor, rounding: str, compensation: Tensor | None, generator: torch.Generator | None) -> Iterator[None]:
    """Inside, a 16-bit or coded parameter is float32 (its compensation added); after it, rounded back into its own storage."""
    codes = codes_of(p)
    if codes is None and p.dtype not in NARROW:
        yield
        return
    kept, wide = p.data, p.data.float() if codes is None else codes.read()
    if compensation is not None:
        wide.add_(compensation)
    p.data = wide
    try:
        yield
    finally:
        p.data = kept
    if codes is not None:
        codes.write(wide, generator)
    elif rounding == "kahan":
        kept.copy_(wide)
        compensation.copy_(wide.sub_(kept))
    else:
        kept.copy_(round_stochastic(wide, kept.dtype, generator))
