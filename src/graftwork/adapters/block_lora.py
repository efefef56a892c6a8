"""Block-LoRA: n up-projections over one shared down-projection (arXiv 2501.16720), kept as the one pair that they are.

    paper:  dW = s (B_1 + ... + B_n) A,   A (r, in), B_i (out, r), all B_i zero at the start, s = alpha / (n r)
    here:   dW = s B A,                   B = B_1 + ... + B_n (out, r), learning rate of B times n

Every B_i has the same gradient, so copies that start equal stay equal, under SGD, Adam and any other rule that works entry by
entry: the sum moves n times as far as one of them. The two forms have the same trajectory and the same function class, rank
r; the n - 1 further copies only cost memory, so they are not kept. `r` is the true rank here, the paper's is n r. With n = 1
this is LoRA.

Parameters r (in + out). The paper's form has r in + n r out, of which (n - 1) r out are copies.

Differs from the paper where copies are visible from outside: gradient clipping by the global norm counts B once (n copies
count sqrt(n) times as much), and a decoupled weight decay, which multiplies the rate, pulls n times as strongly on B. Divide
the decay by n to get the paper's.
"""

from __future__ import annotations

from pydantic import Field

from ..registry import register
from ._weights import check_rank
from .base import AdapterConfig, pattern_value
from .lora import LoRA, LoRAAdapter


class BlockLoRA(AdapterConfig):
    """Options of `block_lora`."""

    r: int = Field(4, ge=1, description="rank of the change (the paper's r is n_blocks times this)")
    n_blocks: int = Field(2, ge=1, description="n, the up-projections that share A")
    alpha: float | None = Field(None, description="scale numerator over n r; default n r, so s = 1")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    rank_pattern: dict[str, int] = {}


@register("adapter", "block_lora", config=BlockLoRA, paper="2501.16720",
          title="One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
          summary="n up-projections on one shared A, collapsed exactly to LoRA with B's rate times n",
          bibtex="@article{zhou2025blocklora, title={One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based "
                 "Few-Shot Learning}, author={Zhou, Chunpeng and others}, journal={arXiv preprint arXiv:2501.16720}, "
                 "year={2025}}")
class BlockLoRAAdapter(LoRAAdapter):
    def __init__(self, site, config, *, shared, generator):
        r, n = pattern_value(config.rank_pattern, site.name, config.r), config.n_blocks
        check_rank("block_lora", site, r)
        alpha = None if config.alpha is None else config.alpha / n
        super().__init__(site, LoRA(r=r, alpha=alpha, dropout=config.dropout, loraplus_lr_ratio=float(n)), shared=shared,
                         generator=generator)

    @classmethod
    def parameter_count(cls, site, config):
        return pattern_value(config.rank_pattern, site.name, config.r) * (site.in_features + site.out_features)
