"""What the formats of codes share: leaves as frozen bytes with a shape each, and products tile by tile.

A format gives `leaf_kinds` (shape and dtype of every leaf) and `decode` (rows of W in fp32 from the leaves). A forward decodes about
`_tiles.TILE` weights at a time, multiplies by them and drops them, so that no float copy of a large matrix ever exists; so does the
backward pass, which saves nothing of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling import repeated
from ..modeling.arithmetic import dtype_for, product_dtype
from . import _tiles
from ._packing import pack, unpack
from .base import Storage, StorageConfig, bytes_parameter, differentiated, view_as


class CodedStorage(Storage):
    """Subclasses implement `from_weight`, `leaf_kinds` and `decode`.

    varying: leaves whose first size depends on the values of the weight (fake weights give an expectation); loading a state dict
    takes over the sizes that it has."""

    varying: ClassVar[tuple[str, ...]] = ()

    def __init__(self, out_features: int, in_features: int, config: StorageConfig, leaves: dict[str, Tensor], bias: Tensor | None,
                 compute_dtype: torch.dtype):
        """leaves: the tensors of `leaf_kinds`, in their true dtypes."""
        super().__init__(out_features, in_features, bias, compute_dtype)
        self.options = config
        for name, value in leaves.items():
            self.register_parameter(name, bytes_parameter(value))
        self._kinds = {name: (tuple(value.shape), value.dtype) for name, value in leaves.items()}

    # -- to be written by a format --------------------------------------------------------------------------------
    def decode(self, leaves: dict[str, Tensor], rows: slice) -> Tensor:
        """Rows of W, (n, in) fp32, differentiable in the float leaves; rows: of W, with start and stop, step 1."""
        raise NotImplementedError

    # -- shared -----------------------------------------------------------------------------------------------------
    def leaf_kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{leaf: its shape and dtype}."""
        return self._kinds

    def leaves(self) -> dict[str, Tensor]:
        return {name: view_as(self._parameters[name].detach(), dtype).view(shape) for name, (shape, dtype) in self.leaf_kinds().items()}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.varying:
            shape, dtype = self._kinds[name]
            found, each = state_dict.get(prefix + name), math.prod(shape[1:]) * dtype.itemsize
            if found is not None and found.numel() != self._parameters[name].numel() and found.numel() % each == 0:
                own = self._parameters[name]
                self._kinds[name] = ((found.numel() // each, *shape[1:]), dtype)
                self._parameters[name] = nn.Parameter(torch.empty(found.numel(), dtype=own.dtype, device=own.device), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _given(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.leaves()
        if unknown := set(leaves) - set(own):
            raise UsageError(f"storage '{self.method}' has no leaf '{sorted(unknown)[0]}'", remedy=f"leaves: {', '.join(own)}")
        return {**own, **leaves}

    def dequantize(self, leaves=None):
        if leaves is None:
            return self.dense_as(self.compute_dtype)
        return self.decode(self._given(leaves), slice(0, self.out_features)).to(self.compute_dtype)

    def nearest_codes(self, weight: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Codes (out, in) uint8 of the numbers nearest to weight (out, in) fp32 under all leaves, and their bits; where a format
        `recodes`."""
        raise NotImplementedError

    @torch.no_grad()
    def recoded(self, weight, leaves, moved):
        if not self.recodes:
            return super().recoded(weight, leaves, moved)
        leaves = self._given(leaves)
        codes, bits = self.nearest_codes(weight.float(), leaves)
        return pack(torch.where(moved, codes, unpack(leaves["codes"], self.in_features, bits)), bits)

    def _checked(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those given to `with_leaves`."""
        if wrong := [name for name in sorted(leaves) if not self.lets_train(name)]:
            raise UsageError(f"storage '{self.method}': leaf '{wrong[0]}' is not one that an adapter trains",
                             remedy=f"trainable: {', '.join(self.trainable_leaves) or 'none'}")
        return leaves

    def _tiles(self):
        return _tiles.row_tiles(self.out_features, self.in_features)

    def _rounded(self, leaves: dict[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
        # Rounded to the compute dtype on the way, so that every product is by the same numbers.
        return self.decode(leaves, rows).to(self.compute_dtype).to(dtype)

    @torch.no_grad()
    def dense_as(self, dtype: torch.dtype) -> Tensor:
        leaves, tiles = self.leaves(), self._tiles()
        if len(tiles) == 1:
            return self._rounded(leaves, tiles[0], dtype)
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        for rows in repeated.each(tiles):
            dense[rows] = self._rounded(leaves, rows, dtype)
        return dense

    @torch.no_grad()
    def rows(self, index):
        return self.dequantize().index_select(0, index)

    def product(self, x: Tensor, leaves: dict[str, Tensor] | None = None) -> Tensor:
        if leaves is None:
            return _TiledProduct.apply(x, self) if differentiated(x) else self.forward_product(x)
        if torch.is_grad_enabled():
            return _LeafProduct.apply(x, self, tuple(leaves), *leaves.values())
        return self._product_with(x, self._given(leaves))  # plain operations: forward-mode tangents pass

    def _product_with(self, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """x D(W)^T with these leaves, tile by tile."""
        dtype = dtype_for(x)
        wide = x.to(dtype)
        parts = [F.linear(wide, self._rounded(leaves, rows, dtype)) for rows in self._tiles()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)

    def forward_product(self, x: Tensor) -> Tensor:
        """x D(W)^T, (..., in) -> (..., out) in x's dtype, without gradient: tile by tile, or by a kernel of the format."""
        leaves = self.leaves()
        return tiled_product(x, self._tiles(), lambda rows, dtype: self._rounded(leaves, rows, dtype))

    def transposed(self, grad: Tensor) -> Tensor:
        leaves = self.leaves()
        return tiled_transposed(grad, self._tiles(), lambda rows, dtype: self._rounded(leaves, rows, dtype))


def tiled_product(x: Tensor, tiles: list[slice], decode: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """x W^T, (..., in) -> (..., out) in x's dtype; decode(rows, dtype): these rows of W."""
    dtype = dtype_for(x)
    wide = x.to(dtype)
    if len(tiles) == 1:
        return F.linear(wide, decode(tiles[0], dtype)).to(x.dtype)
    flat = wide.reshape(-1, wide.shape[-1])
    y = torch.empty(flat.shape[0], tiles[-1].stop, dtype=x.dtype, device=x.device)
    for rows in repeated.each(tiles):
        if dtype == x.dtype:
            torch.mm(flat, decode(rows, dtype).T, out=y[:, rows])
        else:
            y[:, rows] = F.linear(flat, decode(rows, dtype))
    return y.view(*x.shape[:-1], y.shape[1])


def tiled_transposed(grad: Tensor, tiles: list[slice], decode: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """grad W, (..., out) -> (..., in) in grad's dtype."""
    dtype = product_dtype(grad.dtype, grad.device)
    wide = grad.to(dtype)
    if len(tiles) == 1:
        return (wide @ decode(tiles[0], dtype)).to(grad.dtype)
    wide, found = wide.reshape(-1, grad.shape[-1]), None
    for rows in repeated.each(tiles):
        tile = decode(rows, dtype)
        found = wide[:, rows] @ tile if found is None else found.addmm_(wide[:, rows], tile)
    return found.to(grad.dtype).view(*grad.shape[:-1], found.shape[1])


class _TiledProduct(torch.autograd.Function):
    """y = x D(W)^T; D(W) is decoded again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, storage: CodedStorage) -> Tensor:
        ctx.storage = storage
        with torch.no_grad():
            return storage.forward_product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if not ctx.needs_input_grad[0]:
            return None, None
        return (_TransposedProduct.apply(grad, ctx.storage) if torch.is_grad_enabled() else ctx.storage.transposed(grad)), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        return ctx.storage.product(tangent)  # differentiable once more, if tangents are


class _TransposedProduct(torch.autograd.Function):
    """g D(W), whose own derivative is the product again."""

    @staticmethod
    def forward(ctx, grad: Tensor, storage: CodedStorage) -> Tensor:
        ctx.storage = storage
        with torch.no_grad():
            return storage.transposed(grad)

    @staticmethod
    def backward(ctx, twice: Tensor):
        return _TiledProduct.apply(twice, ctx.storage), None


class _LeafProduct(torch.autograd.Function):
    """y = x D(W)^T, differentiable in some float leaves. Saved are x and these leaves; the backward pass decodes W again, and forms the
    gradient of W a tile at a time, which the format's own derivative reduces to the leaves'."""

    @staticmethod
    def forward(ctx, x: Tensor, storage: CodedStorage, names: tuple[str, ...], *given: Tensor) -> Tensor:
        ctx.storage, ctx.names = storage, names
        ctx.save_for_backward(x, *given)
        leaves = storage._given(dict(zip(names, given)))
        return tiled_product(x, storage._tiles(), lambda rows, dtype: storage._rounded(leaves, rows, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (x, *given), storage = ctx.saved_tensors, ctx.storage
        dtype = product_dtype(grad.dtype, grad.device)
        g, rows = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
        wanted = [needed for needed in ctx.needs_input_grad[3:]]
        found = [torch.zeros_like(leaf) if needed else None for leaf, needed in zip(given, wanted)]
        dx = None
        for tile in repeated.each(storage._tiles()):
            with torch.enable_grad():
                own = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(given, wanted)]
                dense = storage.decode(storage._given(dict(zip(ctx.names, own))), tile)
            if ctx.needs_input_grad[0]:
                rounded = dense.detach().to(storage.compute_dtype).to(dtype)
                dx = g[:, tile] @ rounded if dx is None else dx.addmm_(g[:, tile], rounded)
            if any(wanted):
                learned = [leaf for leaf, needed in zip(own, wanted) if needed]
                parts = iter(torch.autograd.grad(dense, learned, (g[:, tile].T @ rows).to(dense.dtype)))
                found = [sum_ if sum_ is None else sum_.add_(next(parts)) for sum_ in found]
        return None if dx is None else dx.to(x.dtype).reshape(x.shape), None, None, *found
