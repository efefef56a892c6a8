"""Learned scalar code books: k-means, eDKM (arXiv 2309.00964) and JLCM (arXiv 2309.17361).

W (out, in): a weight is a code of b bits in a book of K = 2^b numbers. A group of rows has a book of its own, or a scale of its
own below one book for the matrix (`per_rows`); a group is `rows_per_book` rows one after the other, or (`grouping: distribution`) rows
whose weights are distributed alike, wherever they are, and then every row notes its group.

    D(W)_ij = book[group_i, code_ij]     or     scale[group_i] book[code_ij]

Fits of the book, all without random numbers:
    kmeans  sum_ij h_j (w_ij - c_code)^2 by Lloyd's steps, h = 1 or (`weighted`) the diagonal of H, the mean of x x^T over inputs
    edkm    c_k = sum h a_k w / sum h a_k,  a = softmax(-(w - c)^2 / (tau mean w^2)), iterated from kmeans; tau -> 0 is kmeans
    jlcm    book and codes trained together on tr((D - W) H (D - W)^T), the output error over all tokens of the calibration: every weight
            has logits of the codes within `reach` of its first one, D = sum p c, p = softmax(beta logits), with g = (D - W) H

                d logit_k = g p_k (c_k - D) / |c_k - c_now|^proximal,     d c_k = sum of g p_k over the weights

            in Adam's steps, linearly slower, from kmeans; beta grows until p is one code. The best book with whole codes is kept, so
            the error is never above that of kmeans.

Bits a weight: b + 16 books K / (out in), + 16 groups / (out in) of scales, + 8 / in (16 above 256 groups) with `grouping: distribution`;
32 for 16 with `book_dtype: fp32`. Rows of codes are filled up to whole bytes.

Departures. eDKM: tau is relative to the mean square of the weights (in the public code it is absolute, hence tied to the scale of
the weights), attention is not cut from below, and the training of W through the attention is no storage (the codes here are frozen,
the book is a leaf that can train). JLCM: there is no public code and the paper leaves the weighting and the clustering open; here the
distance of codes (in mean gaps, at least 1) to the power `proximal` and k-means of quantile functions. Rows are not permuted with
the permutation folded into neighbors, which the residual stream and rotary pairs forbid: a byte or two a row says the group.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import register
from ._book_fit import joint, lloyd, masses, nearest, nearest_rows, rows_alike, soft_means, start
from ._coded import CodedStorage
from ._packing import pack, packed_width, unpack
from .base import StorageConfig, check_weight

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class Codebook(StorageConfig):
    bits: int = Field(4, ge=2, le=8)
    rows_per_book: int = Field(0, ge=0, description="rows of a group (the mean, with grouping: distribution); 0: the whole matrix")
    per_rows: Literal["book", "scale"] = "book"
    """What a group of rows has of its own; with scale, the book is the matrix's."""
    grouping: Literal["neighbors", "distribution"] = "neighbors"
    book_dtype: Literal["fp16", "fp32"] = "fp16"
    """Of books and scales."""
    fit: Literal["kmeans", "edkm", "jlcm"] = "kmeans"
    weighted: bool = False
    """kmeans, edkm: errors count by the mean square of their input (reads calibration data, as jlcm always does)."""
    iterations: int = Field(100, ge=0)
    tau: float = Field(1e-4, gt=0, description="edkm: temperature, of the mean square of the weights")
    rate: float = Field(0.1, gt=0, description="jlcm: step of the logits; a tenth of it, in gaps of the book, that of the book")
    reach: int = Field(3, ge=1, description="jlcm: how far a code may move; the fit keeps 3 (2 reach + 1) numbers a weight")
    proximal: float = Field(1.0, ge=0, description="jlcm: how much near codes are preferred; 0: the plain gradient")


@register("storage", "codebook", config=Codebook, title="Learned code books", lossless=False, paper="2309.00964",
          aliases=("edkm", "jlcm"), summary="a code in a learned table of 4 to 256 numbers, of the matrix or of rows: 4.02 bits a weight",
          bibtex="@article{cho2024edkm, title={{eDKM}: An Efficient and Accurate Train-Time Weight Clustering for Large Language Models}, "
                 "author={Cho, Minsik and Vahid, Keivan A. and Fu, Qichen and Adya, Saurabh and Del Mundo, Carlo C. and Rastegari, "
                 "Mohammad and Naik, Devang and Zatloukal, Peter}, journal={IEEE Computer Architecture Letters}, year={2024}}")
class CodebookStorage(CodedStorage):
    """Leaves: `codes` (out, ceil(in b / 8)) uint8, `book` (books, 2^b); `scale` (groups,) with per_rows: scale; `group` (out,) uint8 or
    int16 with grouping: distribution."""

    trainable_leaves = ("book",)  # `scale` is of groups of rows, not what a method that trains the scale of every row expects
    recodes = True

    @classmethod
    def needs(cls, config):
        return frozenset({"hessian"}) if config.weighted or config.fit == "jlcm" else frozenset()

    @classmethod
    def without_data(cls, config):
        return config.model_copy(update={"fit": "kmeans" if config.fit == "jlcm" else config.fit, "weighted": False})

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "codebook storage")
        rows, columns = weight.shape
        groups, kept = cls._groups(config, rows), DTYPES[config.book_dtype]
        if groups > 32767:
            raise UsageError(f"codebook storage: {groups} groups of rows", remedy="give a larger rows_per_book")
        books = 1 if config.per_rows == "scale" else groups
        hessian = None if statistics is None else statistics.hessian
        if cls.needs(config) and hessian is None and has_values(weight):
            raise UsageError(f"code books fitted by {config.fit}{' with weights' if config.weighted else ''} read how the inputs of each "
                             "layer are distributed, and there is no such data", remedy="give calibration data, or fit: kmeans")
        if not has_values(weight):
            leaves = {"codes": weight.new_empty((rows, packed_width(columns, config.bits)), dtype=torch.uint8),
                      "book": weight.new_empty((books, 2**config.bits), dtype=kept)}
            leaves |= {"scale": weight.new_empty(groups, dtype=kept)} if config.per_rows == "scale" else {}
            leaves |= {"group": weight.new_empty(rows, dtype=_index(groups))} if config.grouping == "distribution" else {}
            return cls(rows, columns, config, leaves, bias, dtype or weight.dtype)
        if weight.abs().max() > torch.finfo(kept).max:
            raise UsageError(f"codebook storage: a weight of {float(weight.abs().max()):.3g} is no {config.book_dtype} number",
                             remedy="book_dtype: fp32")
        wide = weight.detach().float()
        which = torch.arange(rows, device=weight.device) // (config.rows_per_book or rows)
        group = rows_alike(wide, groups) if config.grouping == "distribution" else which
        leaves = {"group": group.to(_index(groups))} if config.grouping == "distribution" else {}
        if config.per_rows == "scale":
            size = torch.bincount(group, minlength=groups) * columns
            scale = (torch.zeros(groups, device=weight.device).index_add_(0, group, (wide**2).sum(1)) / size.clamp(min=1)).sqrt().to(kept)
            leaves["scale"] = scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            wide, importance = wide / scale.float()[group][:, None], scale.float()[group] ** 2
            group = torch.zeros_like(group)
        else:
            importance = torch.ones(rows, device=weight.device)
        codes, book = cls._fit(wide, group, books, importance, hessian, config)
        return cls(rows, columns, config, {"codes": pack(codes, config.bits), "book": book.to(kept), **leaves}, bias, dtype or weight.dtype)

    @classmethod
    def from_codes(cls, codes: Tensor, book: Tensor, config: Codebook, *, dtype: torch.dtype) -> CodebookStorage:
        """Codes (out, in) uint8 and a book (2^b,) of the matrix, found elsewhere. dtype: the compute dtype."""
        return cls(*codes.shape, config, {"codes": pack(codes, config.bits), "book": book[None].to(DTYPES[config.book_dtype])}, None, dtype)

    @staticmethod
    def _groups(config: Codebook, rows: int) -> int:
        return -(-rows // config.rows_per_book) if config.rows_per_book else 1

    @staticmethod
    def _fit(wide: Tensor, group: Tensor, books: int, importance: Tensor, hessian: Tensor | None, config: Codebook):
        """-> codes (out, in) uint8 and books (books, K) fp32, as they are kept."""
        size, found = 2**config.bits, torch.zeros(books, 2**config.bits, device=wide.device)
        members = [(group == b).nonzero().flatten() for b in range(books)] if books > 1 else [slice(None)]
        for b, rows in enumerate(members):
            own, mass = wide[rows], None
            if not own.numel():
                continue
            if config.weighted or config.fit == "jlcm":
                mass = importance[rows][:, None] * hessian.diagonal().to(wide.device).clamp(min=0)
            elif config.per_rows == "scale":
                mass = importance[rows][:, None].expand_as(own)
            values, mass = masses(own, mass)
            book = start(values, mass, size)
            found[b] = book = lloyd(values, mass, book, config.iterations if config.fit == "kmeans" else 100)
            if config.fit == "edkm":
                found[b] = soft_means(values, mass, book, config.iterations, config.tau)
        kept = DTYPES[config.book_dtype]
        if config.fit == "jlcm":
            codes, found = joint(wide, found, group, importance, hessian.float(), iterations=config.iterations, rate=config.rate,
                                 reach=config.reach, proximal=config.proximal)
            return codes, found.to(kept).float()
        found, codes = found.to(kept).float(), torch.empty(wide.shape, dtype=torch.uint8, device=wide.device)
        for book, rows in zip(found, members):
            codes[rows] = nearest(wide[rows], book)
        return codes, found

    def _group(self, leaves: dict[str, Tensor], rows: slice) -> Tensor:
        if "group" in leaves:
            return leaves["group"][rows].int()
        every = self.options.rows_per_book or self.out_features
        return torch.arange(rows.start, rows.stop, dtype=torch.int32, device=leaves["codes"].device) // every

    def decode(self, leaves, rows):
        codes, size = unpack(leaves["codes"][rows], self.in_features, self.options.bits).int(), 2**self.options.bits
        scaled = "scale" in leaves
        if leaves["book"].shape[0] > 1:
            codes = codes + size * self._group(leaves, rows)[:, None]
        dense = leaves["book"].float().flatten().index_select(0, codes.flatten()).view(codes.shape)
        return dense * leaves["scale"].float()[self._group(leaves, rows)][:, None] if scaled else dense

    def nearest_codes(self, weight, leaves):
        group, book = self._group(leaves, slice(0, self.out_features)).long(), leaves["book"].float()
        if "scale" in leaves:
            weight = weight / leaves["scale"].float()[group][:, None]
        return nearest_rows(weight, book, group if len(book) > 1 else torch.zeros_like(group)), self.options.bits

    def with_leaves(self, leaves, *, exact=True):
        options = self.options.model_copy(update={"book_dtype": "fp32"}) if exact else self.options
        kinds = {name: dtype for name, (_, dtype) in self.leaf_kinds().items()}
        kinds |= {name: DTYPES[options.book_dtype] for name in ("book", "scale")}
        kept = {name: value.detach().to(kinds[name]) for name, value in self._given(self._checked(leaves)).items()}
        cls = getattr(type(self), "plain_class", type(self))
        return cls(self.out_features, self.in_features, options, kept, self.bias, self.compute_dtype)

    def fake_quantize(self, weight, leaves=None):
        """D(Q(weight)): the nearest codes of the given books; straight through to weight, through the table to the book."""
        if leaves is None:
            return super().fake_quantize(weight)
        leaves = self._given(leaves)
        with torch.no_grad():
            codes, bits = self.nearest_codes(weight.float(), leaves)
        value = self.dequantize({**leaves, "codes": pack(codes, bits)})
        return value + (weight - weight.detach()).to(value.dtype)


def _index(groups: int) -> torch.dtype:
    return torch.uint8 if groups <= 256 else torch.int16
