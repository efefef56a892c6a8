"""GGUF: weights in GGML's block types, kept byte for byte as a .gguf file has them.

One leaf, `blocks` (out, bytes of a row) uint8; a row is a run of blocks of 32 or 256 weights, each with its own scales
(modeling.gguf_blocks has the types and their sums). Values are those of llama.cpp bit for bit before they are rounded to the compute dtype.

    bits a weight    q2_k 2.625, q3_k 3.4375, q4_0 q4_k iq4_nl 4.5, iq4_xs mxfp4 4.25, q4_1 5, q5_0 q5_k 5.5, q5_1 6, q6_k 6.5625, q8_0 8.5

From a .gguf file with `type: auto`, every linear weight keeps the type and the blocks that the file has (files mix types); weights that
the file keeps in fp16, bf16 or fp32 stay dense modules, and so does the embedding, decoded. Nothing else of the model is ever
dense. Any other source, or a type by name, is quantised: q4_0 ... q8_0 and mxfp4 as llama.cpp does, the rest by least squares
(_gguf_quantizers). Rows that are no multiple of a block are filled up with zeros, which are counted in the bits.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..errors import UsageError
from ..modeling.gguf_blocks import BLOCK_TYPES, decode_rows
from ..modeling.protocols import has_values
from ..registry import register
from ._coded import CodedStorage
from ._gguf_quantizers import QUANTIZERS
from ._tiles import TILE
from .base import StorageConfig, check_weight

#: what `auto` makes of a weight that has no blocks yet
DEFAULT = "q4_k"


class GGUF(StorageConfig):
    type: Literal["auto", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
                  "mxfp4"] = "auto"
    """auto: the types of the .gguf file, q4_k for other sources. Otherwise the type that every weight is quantised to."""


@register("storage", "gguf", config=GGUF, title="GGUF blocks", lossless=False, aliases=("ggml", "k-quants"),
          summary="the block types of llama.cpp (q4_0 ... q6_k), kept as they are in a .gguf file: 4.5 bits a weight as q4_k")
class GGUFStorage(CodedStorage):
    """Leaf: `blocks` (out, bytes of a row) uint8. `options.type` is the type of this weight, never auto."""

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "gguf storage")
        kind = DEFAULT if config.type == "auto" else config.type
        (rows, columns), found = weight.shape, BLOCK_TYPES[kind]
        blocks = torch.empty(rows, found.width(columns), dtype=torch.uint8, device=weight.device)
        if has_values(weight):
            step, short = max(1, TILE // columns), -columns % found.length
            for start in range(0, rows, step):
                part = torch.nn.functional.pad(weight[start:start + step].float(), (0, short))
                blocks[start:start + step] = QUANTIZERS[kind](part.reshape(-1, found.length)).view(part.shape[0], -1)
                if not decode_rows(blocks[start:start + step], kind, columns).isfinite().all():
                    raise UsageError(f"gguf storage: the weight's largest entry is {weight.abs().max():.3g}, beyond the scales of {kind}",
                                     remedy="choose another storage: nf4 and int8 keep scales in fp32")
        return cls.from_blocks(blocks, kind, columns, config, bias=bias, dtype=dtype or weight.dtype)

    @classmethod
    def load(cls, ref, config, *, on_site=None, **options):
        from ..modeling.gguf_codes import load_coded
        from ..modeling.references import resolve

        ref = resolve(ref)
        if ref.kind != "gguf" or config.type != "auto":
            return None
        return load_coded(ref, lambda model, source: _keep(cls, model, source, config, on_site), **options)

    @classmethod
    def from_blocks(cls, blocks, kind, columns, config, *, bias=None, dtype=torch.float32):
        """Blocks (out, bytes) uint8 of a type, as they are in a file. columns: weights of a row."""
        found = BLOCK_TYPES[kind]
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != found.width(columns):
            raise UsageError(f"gguf storage: blocks {tuple(blocks.shape)} {blocks.dtype} are no rows of {columns} weights as {kind}",
                             remedy=f"give uint8 of shape (out, {found.width(columns)})")
        return cls(blocks.shape[0], columns, config.model_copy(update={"type": kind}), {"blocks": blocks}, bias, dtype)

    def decode(self, leaves, rows):
        return decode_rows(leaves["blocks"][rows], self.options.type, self.in_features)

    @torch.no_grad()
    def rows(self, index):
        return decode_rows(self.leaves()["blocks"].index_select(0, index), self.options.type, self.in_features).to(self.compute_dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, type={self.options.type}"


def _keep(cls: type[GGUFStorage], model, source, config: GGUF, on_site) -> None:
    """Put the file's blocks in place of the linear maps of a model whose weights are on meta or fake."""
    from ..modeling.calls import keep_calls
    from ..modeling.experts import expert_linears
    from ..modeling.protocols import is_conv1d
    from ..modeling.sites import linear_modules

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, *_ in expert_linears(model):
        raise UsageError(f"'{name}' fuses weights that the file keeps apart, whose blocks cannot be kept",
                         remedy=f"storage: {{method: gguf, type: {DEFAULT}}} quantises the decoded weights again")
    for name, module, product in list(linear_modules(model)):
        weight = f"{name}.weight"
        if module is head or name.split(".")[-1] in config.skip_modules or weight not in source or source.kind(weight) is None:
            continue
        stored = cls.from_blocks(source.blocks(weight), source.kind(weight), product.in_features, config, bias=product.bias,
                                 dtype=product.dtype)
        stored.transposed_source = is_conv1d(module)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, stored)
        keep_calls(model.get_submodule(parent), last)
        if on_site:
            on_site(name)
    model.__dict__["graft_storage"], model.__dict__["graft_codes_kept"] = config, True
