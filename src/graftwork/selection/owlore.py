"""OwLore: outlier-weighed layer sampling (arXiv 2405.18380). LISA whose layers are drawn with the probabilities of their outliers.

    once, on data, for every weight W (out, in) of a layer with inputs x_t:   A_ij = |W_ij| ||X_j||_2,   ||X_j||^2 = sum_t x_tj^2
    D_l = share of the entries of all A of layer l that are larger than tau times their mean over the layer
    at step 0 and every `interval` steps: `layers` of the L layers without replacement, one after the other with p_l proportional to
        owl D_l    owl_reverse max D - D_l    uniform 1    increase l = 1..L    decrease L..1    norm ||W_l||_F
    only these, and (with always_on) embeddings, output head and final norm, train until the next draw

The paper's recipe is this with `optimizer: galore`. A layer that is frozen again loses moments *and projector*, so it starts afresh at its
next turn (the official code goes on from stale ones); one that is drawn twice in a row keeps them. The layers drawn are those with the
smallest -log(u_l) / p_l, u_l uniform: the law of drawing one by one and taking out what was drawn (numpy.random.choice(p=p,
replace=False)). Layers with p_l = 0 are drawn only where the others are used up. uniform draws what `lisa` draws.

Scores are taken once, before the first draw, and kept for the whole run (L numbers in the checkpoint). The data: up to max_batches batches
of the run (a step without a run around it uses its own); padding does not count. A plan has no values, so what is drawn by scores is not
known: it counts the heaviest layers, an upper bound. With `scores` in the recipe it knows the draws of the run. Fused experts are not
scored. Not in the paper's text: the weights `norm` measures are here all tensors of a layer with two dimensions or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..modeling.sites import linear_modules
from ..registry import MethodConfig, register
from .base import SHARE, Selection, SelectionContext, decoder_blocks, parts_of_model, train_only
from .lisa import draw, heaviest_interval

INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
DATA = ("owl", "owl_reverse")
SCORED = (*DATA, "norm")


class OwLore(MethodConfig):
    """Options of `owlore`."""

    layers: int = Field(5, ge=1, description="decoder layers that train at a time (gamma)")
    interval: int = Field(50, ge=1, description="optimizer steps between draws (K)")
    mode: Literal["owl", "owl_reverse", "uniform", "increase", "decrease", "norm"] = Field("owl", description="what p_l follows")
    tau: float = Field(13.0, gt=0.0, description="an outlier is larger than tau times the layer's mean")
    max_batches: int = Field(16, ge=1, description="calibration batches")
    scores: list[float] | None = Field(None, description="D_l of each layer where they are known (`outlier_shares`): no data is looked at")
    always_on: bool = Field(True, description="train embeddings, head and final norm all the time")

    @model_validator(mode="after")
    def _read_by_the_mode(self):
        idle = [name for name in ("tau", "max_batches") if getattr(self, name) != type(self).model_fields[name].default]
        if idle and (self.mode not in DATA or self.scores):
            why = "scores are given" if self.mode in DATA else f"mode {self.mode} looks at no data; choose {' or '.join(DATA)}"
            raise ValueError(f"{', '.join(idle)}: {why}")
        if self.scores is not None and (self.mode not in SCORED or not all(0 <= s < math.inf for s in self.scores)):
            raise ValueError(f"scores: finite numbers of 0 or more, read by mode {', '.join(SCORED)}")
        return self


@register("selection", "owlore", config=OwLore, paper="2405.18380",
          title="OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection",
          summary="full tuning of a few layers at a time, drawn by their outliers; with galore the published recipe",
          bibtex="@article{li2024owlore, title={OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for Memory-Efficient LLM "
                 "Fine-tuning}, author={Li, Pengxiang and Yin, Lu and Gao, Xiaowei and Liu, Shiwei}, journal={arXiv:2405.18380}, "
                 "year={2024}}")
class OwLoreSelection(Selection):
    full_tuning_only = True
    shows = SHARE

    def __init__(self, config: OwLore | None = None):
        super().__init__(config or OwLore())
        self.scores: list[float] | None = self.config.scores
        self._drawn = -1

    def begin(self, ctx: SelectionContext) -> None:
        """Scores, unless given or resumed, and the draw for the interval that ctx.step is in."""
        blocks = decoder_blocks(ctx.model)
        if self.config.layers > len(blocks):
            raise UsageError(f"owlore: layers = {self.config.layers}, but the model has {len(blocks)}",
                             remedy=f"choose at most {len(blocks)}")
        if self._unknown() and has_values(next(ctx.model.parameters())):
            self.scores = self._measure(ctx, blocks).tolist()
        self._apply(ctx)

    def before_step(self, ctx: SelectionContext) -> None:
        if ctx.step // self.config.interval != self._drawn:
            self._apply(ctx)

    def heaviest_steps(self, ctx: SelectionContext) -> range:
        """The interval whose draw takes the most memory; the whole run while the scores are not known."""
        if self._unknown():
            return super().heaviest_steps(ctx)
        total = len(decoder_blocks(ctx.model))
        return heaviest_interval(ctx, self.config, lambda interval: self.active_layers(ctx.seed, interval, total))

    def _unknown(self) -> bool:
        return self.scores is None and self.config.mode in SCORED

    def probabilities(self, total: int) -> list[float]:
        """p of each layer, from 0; they sum to 1. Raises UsageError for scores of another number of layers."""
        if self.scores is not None and len(self.scores) != total:
            raise UsageError(f"owlore has scores of {len(self.scores)} layers, and the model has {total}", remedy="give one number a layer")
        kept = self.scores or [1.0] * total
        weights = {"uniform": [1.0] * total, "increase": list(range(1, total + 1)), "decrease": list(range(total, 0, -1)),
                   "owl_reverse": [max(kept) - d for d in kept]}.get(self.config.mode, kept)
        return [w / sum(weights) for w in weights] if sum(weights) else [1.0 / total] * total

    def active_layers(self, seed: int, interval: int, total: int) -> list[int]:
        """The layers drawn for one interval, sorted."""
        p = self.probabilities(total)

        def key(layer: int) -> tuple[bool, float]:
            late = -math.log1p(-draw(seed, interval, layer))  # exponential, and smaller where the hash is
            return p[layer] == 0, late / p[layer] if p[layer] else late

        return sorted(sorted(range(total), key=key)[: self.config.layers])

    def _apply(self, ctx: SelectionContext) -> None:
        self._drawn = ctx.step // self.config.interval
        before, layers, after = parts_of_model(ctx)
        active = self._heaviest(len(layers)) if self._unknown() else self.active_layers(ctx.seed, self._drawn, len(layers))
        train_only(ctx, set().union(*(layers[i] for i in active), *([before, after] if self.config.always_on else [])))

    def _heaviest(self, total: int) -> list[int]:
        """The draw of the largest `weight_of_draw`."""
        highest = list(range(total - self.config.layers, total))
        return highest if self.config.always_on else [0, *highest[1:]]

    def _measure(self, ctx: SelectionContext, blocks: list[nn.Module]) -> Tensor:
        if self.config.mode == "norm":
            squares = [sum(p.detach().double().square().sum() for p in block.parameters() if p.dim() > 1) for block in blocks]
            return torch.stack(squares).sqrt().cpu()
        if ctx.batches is None:
            raise UsageError(f"owlore: mode {self.config.mode} looks at data, and this trainer offers none",
                             remedy="mode: decrease, or scores of outlier_shares(model, batches)")
        return outlier_shares(ctx.model, islice(ctx.batches(), self.config.max_batches), tau=self.config.tau)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scores is None else {"scores": torch.tensor(self.scores, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"].tolist() if "scores" in state else None


@torch.no_grad()
def outlier_shares(model: nn.Module, batches: Iterable[dict[str, Any]], *, tau: float = 13.0) -> Tensor:
    """D_l of each layer, (L,) float64 on the CPU. The model is run without gradients and dropout, and left as it was."""
    blocks = decoder_blocks(model)
    inside = {id(m): number for number, block in enumerate(blocks) for m in block.modules()}
    maps = [(name, module, product) for name, module, product in linear_modules(model) if id(module) in inside]
    squares = _input_squares(model, [(name, module) for name, module, _ in maps], batches)
    shares = []
    for number in range(len(blocks)):
        own = [(product, squares[name].sqrt()) for name, module, product in maps if inside[id(module)] == number and name in squares]
        if not own:
            raise UsageError(f"owlore found no linear map with inputs in layer {number}", remedy="mode: decrease")
        size = sum(product.in_features * product.out_features for product, _ in own)
        mean = sum((product.dense().float().abs() * norm).sum(dtype=torch.float64) for product, norm in own) / size
        above = sum(((product.dense().float().abs() * norm) > tau * mean).sum() for product, norm in own)
        shares.append(above.double() / size)
    return torch.stack(shares).cpu()


def _input_squares(model: nn.Module, maps: list[tuple[str, nn.Module]], batches: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """{map: sum over the tokens of the squares of its inputs, fp32 (in,)}."""
    found: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def reader(name: str):
        def read(module: nn.Module, args: tuple) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            if mask is not None and mask.numel() == rows.shape[0]:
                rows = rows[mask.reshape(-1)]
            found[name] = found.get(name, 0.0) + rows.float().square().sum(0)
        return read

    device, was_training = next(model.parameters()).device, model.training
    handles = [module.register_forward_pre_hook(reader(name)) for name, module in maps]
    runs = getattr(model, "base_model", model)  # no head: nothing in it is scored
    model.eval()
    try:
        for batch in batches:
            real = batch["segment_ids"] > 0 if "segment_ids" in batch else batch.get("attention_mask")
            mask = None if real is None else real.bool().to(device)
            runs(**{k: batch[k].to(device) for k in INPUTS if k in batch}, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not found:
        raise UsageError("owlore got no batch to look at", remedy="give data with at least one batch, or mode: decrease")
    return found
