"""VPTQ: vectors of weights along the output as indices into code books found by k-means (arXiv 2409.17066).

W (out, in). Every column j is brought to 0 ... 1 (`normalize`): w = (W_j - b_j) / s_j with s_j its range and b_j its minimum, both in
fp16. Columns come in the order of H_jj (`act_order`); the first `outlier_columns` of them have a code book of their own, the rest is
cut in `codebooks` runs of columns, each with a book C (k, v) in fp16. A column is cut in ceil(out / v) vectors of v rows:

    C = argmin sum_j s_j^2 H_jj sum_{x in column j} |x - C(x)|^2         (k-means with weights)
    GPTQ's loop over the columns (storage/_second_order.py) with diag(s) H diag(s), each vector to the nearest row of C
    with `residual_bits`: C2 by k-means of what the first pass leaves; then the loop again from W with C[i] + C2[i'], where i is the
    nearest of C and i' the nearest of C2 to the rest
    D(W)_j = s_j concat_i (C[code_ij] + C2[code2_ij]) + b_j

Bits a weight: (index_bits + residual_bits) / v where the columns are not outliers, outlier_bits / outlier_vector where they are; 16
for every number of a book; 16 (order) + 32 (s, b) for each of `in`. A book has at most as many entries as it has vectors (a power of
two, so short matrices take fewer bits); codes are packed in planes of bytes (storage/_packing.py).

Departures: the released code corrects by H where the columns are normalised, which is worse than no correction (here: diag(s) H
diag(s)); a last vector shorter than v takes no part in k-means and is coded by the rows it has, instead of being filled with zeros;
inputs that are always 0 keep their weights (weight 0 in k-means) instead of losing them; empty clusters are filled with the vectors
farthest from their centroids; k-means sees at most 256 random vectors for each entry, the coding all. No tuning
of the books afterwards. Without calibration data H = I, with a warning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import register
from ._coded import CodedStorage
from ._kmeans import kmeans, nearest
from ._packing import pack_wide, unpack_wide, wide_width
from ._second_order import hessian_or_identity, solve
from .base import StorageConfig, check_weight

#: vectors that k-means looks at for each entry of a book, at most
PER_ENTRY = 256
HALF = torch.finfo(torch.float16).max


class VPTQ(StorageConfig):
    vector: int = Field(4, ge=1, le=64, description="rows that share an index")
    index_bits: int = Field(8, ge=1, le=16, description="log2 of the entries of a code book")
    residual_bits: int = Field(0, ge=0, le=16, description="log2 of the entries of the second code book; 0: none")
    codebooks: int = Field(1, ge=1, description="runs of columns with a code book each")
    outlier_columns: float = Field(0.01, ge=0, lt=1, description="part of the columns, of the largest activations, with their own book")
    outlier_vector: int = Field(2, ge=1, le=64)
    outlier_bits: int = Field(8, ge=1, le=16)
    normalize: bool = True
    """Bring every column to 0 ... 1 first."""
    act_order: bool = True
    """Columns of large activations first."""
    iterations: int = Field(25, ge=1, description="of k-means, at most")
    damp: float = Field(0.01, ge=0, description="of H's mean diagonal, added to the diagonal")
    seed: int = Field(0, description="of the first centroids")


class Layout:
    """How the columns, in their order, are split: runs (start, stop, vector, bits, residual bits, first of the outliers or None)."""

    def __init__(self, config: VPTQ, out: int, columns: int):
        self.outliers = min(round(config.outlier_columns * columns), columns - 1)
        self.ordered = config.act_order or self.outliers > 0
        runs = min(config.codebooks, columns - self.outliers)
        edges = [self.outliers + (columns - self.outliers) * i // runs for i in range(runs + 1)]

        def bits(wanted, vector, least):
            count = max(out // vector, 1) * least
            return max(1, min(wanted, count.bit_length() - 1)) if wanted else 0

        narrowest = min(stop - start for start, stop in zip(edges, edges[1:]))
        self.main = (config.vector, bits(config.index_bits, config.vector, narrowest), bits(config.residual_bits, config.vector, narrowest))
        self.first = (config.outlier_vector, bits(config.outlier_bits, config.outlier_vector, self.outliers or 1), 0)
        self.runs = ([(0, self.outliers)] if self.outliers else []) + list(zip(edges, edges[1:]))
        self.books = runs

    def kinds(self, config: VPTQ, out: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        v, bits, more = self.main
        rows, count = -(-out // v), columns - self.outliers
        kinds = {"codes": ((rows, wide_width(count, bits)), torch.uint8), "book": ((self.books, 2**bits, v), torch.float16)}
        if more:
            kinds |= {"residual_codes": ((rows, wide_width(count, more)), torch.uint8),
                      "residual_book": ((self.books, 2**more, v), torch.float16)}
        if self.outliers:
            v, bits, _ = self.first
            kinds |= {"outlier_codes": ((-(-out // v), wide_width(self.outliers, bits)), torch.uint8),
                      "outlier_book": ((1, 2**bits, v), torch.float16)}
        if config.normalize:
            kinds |= {"scale": ((columns,), torch.float16), "offset": ((columns,), torch.float16)}
        if self.ordered:
            kinds["place"] = ((columns,), torch.uint16)
        return kinds


def vectors_of(columns: Tensor, vector: int) -> Tensor:
    """(out, m) -> (m, ceil(out / v), v); a short last vector is filled with zeros."""
    filled = F.pad(columns.T, (0, -columns.shape[0] % vector))
    return filled.reshape(columns.shape[1], -1, vector)


def book_of(columns: Tensor, weights: Tensor, vector: int, bits: int, config: VPTQ, generator: torch.Generator) -> Tensor:
    """columns (out, m), weights (m,) -> a code book (2**bits, v) of what fp16 holds. Vectors that are short of rows count only where
    there are no others, and then without the rows that they lack."""
    out = columns.shape[0]
    found = vectors_of(columns[: out - out % vector or out], vector)
    weights = weights[:, None].expand(found.shape[:2]).flatten()
    found = found.reshape(-1, vector)
    if len(found) > PER_ENTRY * 2**bits:
        some = torch.randperm(len(found), generator=generator, device=generator.device)[: PER_ENTRY * 2**bits].to(found.device)
        found, weights = found[some], weights[some]
    found = kmeans(found, weights, 2**bits, config.iterations, generator)
    return found.clamp(-HALF, HALF).half().float()


class Vectors:
    """The column quantizer: the nearest entries of the books of a column's run. books: (2**bits, v) and maybe a second, for each run."""

    group = 1 << 30

    def __init__(self, runs: list[tuple[int, int]], books: list[tuple[Tensor, ...]], columns: int):
        self.books = [books[i] for i, (start, stop) in enumerate(runs) for _ in range(start, stop)]
        self.codes, self.rest = [None] * columns, [None] * columns

    def start(self, j, columns, diagonal):
        pass

    def quantize(self, j, column, u):
        out, v = len(column), self.books[j][0].shape[1]
        left = vectors_of(column[:, None], v)[0]
        total, codes = torch.zeros_like(left), []
        for book in self.books[j]:
            code = nearest(left, book)
            if short := out % v:  # by the rows that it has
                code[-1:] = nearest(left[-1:, :short], book[:, :short])
            left, total = left - book[code], total + book[code]
            codes.append(code)
        found = total.flatten()[:out]
        self.codes[j], self.rest[j] = codes, column - found
        return found


@register("storage", "vptq", config=VPTQ, title="VPTQ: vector quantization", lossless=False, paper="2409.17066",
          summary="vectors of 4 rows as 8-bit indices into a code book by k-means, columns of large activations finer: about 2.1 bits a "
                  "weight and the books",
          bibtex="@inproceedings{liu2024vptq, title={{VPTQ}: Extreme Low-bit Vector Post-Training Quantization for Large Language "
                 "Models}, author={Liu, Yifei and Wen, Jicheng and Wang, Yang and Ye, Shengyu and Zhang, Li Lyna and Cao, Ting and Li, "
                 "Cheng and Yang, Mao}, booktitle={EMNLP}, year={2024}}")
class VPTQStorage(CodedStorage):
    """Leaves: see `Layout.kinds`; `place` says where a column is in the order of the codes."""

    does_without = True

    @classmethod
    def needs(cls, config):
        return frozenset({"hessian"})

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "vptq storage")
        out, columns = weight.shape
        if columns > 1 << 16:
            raise UsageError(f"vptq storage: places of columns have 16 bits, the weight has {columns} inputs", remedy="storage: int4")
        layout = Layout(config, out, columns)
        kinds = layout.kinds(config, out, columns)
        if has_values(weight):
            hessian = hessian_or_identity(statistics, weight, "vptq")
            found = encode(weight.float(), hessian, config, layout, generator or torch.Generator().manual_seed(config.seed))
            leaves = {name: found[name].to(dtype).view(shape) for name, (shape, dtype) in kinds.items()}
        else:
            leaves = {name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        return cls(out, columns, config, leaves, bias, dtype or weight.dtype)

    def decode(self, leaves, rows):
        layout = Layout(self.options, self.out_features, self.in_features)
        parts = []
        if layout.outliers:
            parts.append(_looked_up(leaves, "outlier_", layout.outliers, layout.first[1], rows, [layout.outliers]))
        widths = [stop - start for start, stop in layout.runs[-layout.books:]]
        main = _looked_up(leaves, "", sum(widths), layout.main[1], rows, widths)
        if layout.main[2]:
            main = main + _looked_up(leaves, "residual_", sum(widths), layout.main[2], rows, widths)
        dense = torch.cat([*parts, main], 1) if parts else main
        if "place" in leaves:
            dense = dense.index_select(1, leaves["place"].int())
        return dense * leaves["scale"].float() + leaves["offset"].float() if "scale" in leaves else dense


def _looked_up(leaves: dict[str, Tensor], prefix: str, count: int, bits: int, rows: slice, widths: list[int]) -> Tensor:
    """Rows of a run of columns, (n, count) fp32."""
    book = leaves[f"{prefix}book"].float()
    books, k, v = book.shape
    first, stop = rows.start // v, -(-rows.stop // v)
    index = unpack_wide(leaves[f"{prefix}codes"][first:stop], count, bits)
    if books > 1:  # the books one below the other
        shift = torch.cat([torch.full((width,), i * k, device=index.device) for i, width in enumerate(widths)])
        index = index + shift
    dense = F.embedding(index, book.view(-1, v)).transpose(1, 2).reshape(-1, count)
    return dense[rows.start - first * v: rows.stop - first * v]


def encode(weight: Tensor, hessian: Tensor, config: VPTQ, layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
    """weight (out, in) fp32 -> the leaves of `Layout.kinds`."""
    leaves, importance = {}, hessian.diagonal().clone()
    dead = importance == 0
    alive = importance[~dead].mean() if not dead.all() else importance.new_ones(())
    hessian = hessian + torch.diag(torch.where(dead, alive, config.damp * alive))
    work, order = weight, order_of(importance, layout, config)
    if config.normalize:
        low = work.amin(0).clamp(-HALF, HALF).half()
        scale = (work.amax(0) - low.float()).clamp(max=HALF).half()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        leaves |= {"scale": scale, "offset": low}
        scale = scale.float()
        work, hessian, importance = (work - low.float()) / scale, hessian * scale * scale[:, None], importance * scale.square()
    if layout.ordered:
        work, hessian, importance = work[:, order], hessian[order][:, order], importance[order]
        leaves["place"] = order.argsort().to(torch.uint16)

    books = []
    for start, stop in layout.runs:
        v, bits, _ = layout.first if layout.outliers and start == 0 else layout.main
        books.append((book_of(work[:, start:stop], importance[start:stop], v, bits, config, generator),))
    found = Vectors(layout.runs, books, work.shape[1])
    solve(work, hessian, found, damp=0)
    v, bits, more = layout.main
    if more:
        rest = torch.stack(found.rest, 1)
        for i in range(len(books) - layout.books, len(books)):
            start, stop = layout.runs[i]
            books[i] += (book_of(rest[:, start:stop], importance[start:stop], v, more, config, generator),)
        found = Vectors(layout.runs, books, work.shape[1])
        solve(work, hessian, found, damp=0)
    first = layout.outliers
    leaves["codes"] = pack_wide(torch.stack([codes[0] for codes in found.codes[first:]], 1), bits)
    leaves["book"] = torch.stack([each[0] for each in books[-layout.books:]])
    if more:
        leaves["residual_codes"] = pack_wide(torch.stack([codes[1] for codes in found.codes[first:]], 1), more)
        leaves["residual_book"] = torch.stack([each[1] for each in books[-layout.books:]])
    if first:
        leaves["outlier_codes"] = pack_wide(torch.stack([codes[0] for codes in found.codes[:first]], 1), layout.first[1])
        leaves["outlier_book"] = books[0][0][None]
    return leaves


def order_of(diagonal: Tensor, layout: Layout, config: VPTQ) -> Tensor:
    """Columns by falling H_jj; without act_order only the outliers are moved to the front."""
    order = diagonal.argsort(descending=True, stable=True)
    if config.act_order:
        return order
    return torch.cat([order[: layout.outliers], order[layout.outliers:].sort().values])
