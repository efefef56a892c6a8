"""The rows of a matrix that a product decodes at a time."""

from __future__ import annotations

#: weights of a tile
TILE = 1 << 20


def row_tiles(out_features: int, in_features: int, together: int = 1) -> list[slice]:
    """Slices of the rows of W: about TILE weights, and a multiple of `together` rows."""
    step = max(1, TILE // (in_features * together)) * together
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]
