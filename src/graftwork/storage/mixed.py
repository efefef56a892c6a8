"""Every matrix in one of several formats, chosen so that the whole model keeps to a budget (LQ-LoRA, arXiv 2311.12023; AdaQuant,
2006.10518).

    minimise sum_i cost[i][c_i]   with   sum_i size[i][c_i] <= bits sum_i |W_i|,   one candidate c_i a matrix

by the integer programme of storage/_allocate.py. size counts every leaf. `cost`, with E = D_c(W_i) - W_i (out, in):
    weights   |E|_F^2;   no data
    outputs   tr(E H E^T), H (in, in) the mean of x x^T over the inputs that the dense model gives this matrix
    loss      what the next-token loss rises by where this matrix alone is D_c(W_i), at least 1e-6: one forward of `rows` sequences a
              matrix and candidate

A candidate's own calibration sees inputs of the dense model here, and those of the quantized layers before it when it is stored. A
matrix that no data reached is taken to get inputs of the mean size. Costs are taken to add up, which is an assumption.

A matrix becomes a storage of the candidate's own class with the candidate's own options, so adapters, merges and artifacts meet a plain
int3, say; folders keep which one it is for every matrix (storage/_folder.py). One made outside of an allocation (a single weight) gets
the largest candidate within the budget, or the smallest where none is. Weights without values (plans) are allocated as if errors fell
fourfold a bit, so a plan's total is right within what the budget leaves over.

Bits a weight: at most `bits` over the model, exactly those of the chosen formats. Oracles: tests/oracles/test_storage_mixed.py.
Departures: AdaQuant counts rises from a model in 8 bits, this from the dense one; activations stay as they are. LQ-LoRA's low-rank part
is in the costs where candidates are `lowrank_plus`; its normalised costs and whole gibibytes of sizes are not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import lookup, make_config, register
from ._allocate import allocate
from ._costs import error_of
from ._groups import _mapping
from .base import Place, Storage, StorageConfig, check_weight, places


def _resolved(value: dict[str, Any]) -> dict[str, Any]:
    options = dict(value)
    info = lookup("storage", options.pop("method", "int4"))
    if info.name == "mixed" or info.traits.get("lossless"):
        raise UsageError(f"storage 'mixed': '{info.name}' is no candidate", remedy="candidates: [int2, int3, int4]")
    if getattr(info.cls, "varying", ()):
        raise UsageError(f"storage 'mixed': the size of '{info.name}' depends on the weights, so no budget can hold it",
                         remedy="candidates: [int2, int3, int4]")
    if "skip_modules" in options:
        raise UsageError("storage 'mixed': skip_modules is an option of mixed, not of a candidate", remedy="skip_modules beside candidates")
    return {"method": info.name, **make_config("storage", info.name, **options).model_dump(exclude={"skip_modules"})}


class Mixed(StorageConfig):
    bits: float = Field(3.5, gt=0, description="budget in bits a weight, over all matrices")
    candidates: list[Annotated[dict[str, Any], BeforeValidator(_mapping), AfterValidator(_resolved)]] = Field(
        ["int2", "int3", "int4", {"method": "int_wide", "bits": 8}], min_length=2)
    """Formats to choose from: names or {method, options}."""
    cost: Literal["weights", "outputs", "loss"] = "weights"
    rows: int = Field(8, ge=1, description="cost: loss: sequences that a rise is measured on")


def candidates_of(config: Mixed) -> list[tuple[type[Storage], StorageConfig]]:
    found = []
    for each in config.candidates:
        options = dict(each)
        name = options.pop("method")
        found.append((lookup("storage", name).cls, make_config("storage", name, **options, skip_modules=config.skip_modules)))
    return found


def sizes_of(config: Mixed, weight: Tensor) -> list[int]:
    """Bits of all leaves of a matrix of this shape, under every candidate."""
    blank = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return [round(cls.from_weight(blank, options).bits_per_weight * weight.numel()) for cls, options in candidates_of(config)]


@register("storage", "mixed", config=Mixed, title="Mixed formats under a budget", lossless=False, paper="2311.12023",
          aliases=("allocated",),
          summary="a format for every matrix, by an integer programme over errors and a budget in bits a weight",
          bibtex="@inproceedings{guo2024lqlora, title={{LQ-LoRA}: Low-rank Plus Quantized Matrix Decomposition for Efficient Language "
                 "Model Finetuning}, author={Guo, Han and Greengard, Philip and Xing, Eric P. and Kim, Yoon}, booktitle={ICLR}, "
                 "year={2024}}")
class MixedStorage(Storage):
    """Never made itself: `from_weight` gives storages of the candidates' classes."""

    allocates = True

    @classmethod
    def needs(cls, config):
        own = {"outputs": {"hessian"}, "loss": {"loss"}}.get(config.cost, set())
        return frozenset(own).union(*(each.needs(options) for each, options in candidates_of(config)))

    @classmethod
    def without_data(cls, config):
        plain = [each.without_data(options) for each, options in candidates_of(config)]
        kept = [{"method": each.method, **each.model_dump(exclude={"skip_modules"})} for each in plain]
        return config.model_copy(update={"candidates": kept, "cost": "weights"})

    @classmethod
    @torch.no_grad()
    def prepare(cls, model, config, batches):
        found, sizes = places(model, config), {}
        if not found:
            return {}
        for place in found:  # alike for alike shapes
            weight = place.product.dense()
            key = (tuple(weight.shape), weight.dtype)
            sizes[place.name] = sizes[key] = sizes[key] if key in sizes else sizes_of(config, weight)
        size = [sizes[place.name] for place in found]
        weights = [place.product.in_features * place.product.out_features for place in found]
        least, room = sum(map(min, size)), config.bits * sum(weights)
        if least > room:
            raise UsageError(f"storage 'mixed': bits: {config.bits:g} is less than the smallest candidates take, "
                             f"{least / sum(weights):.4g} bits a weight", remedy="more bits, or smaller candidates")
        if all(has_values(place.product.dense()) for place in found):
            cost = _measured(model, config, found, batches)
        else:
            cost = [[n * 4.0 ** (-each / n) for each in row] for n, row in zip(weights, size)]
        return {place.name: {"choice": torch.tensor([each])} for place, each in zip(found, allocate(cost, size, room))}

    @classmethod
    def from_weight(cls, weight, config, *, bias=None, dtype=None, statistics=None, generator=None):
        check_weight(weight, "mixed storage")
        choice = getattr(statistics, "choice", None)
        if choice is None:
            size = sizes_of(config, weight)
            fits = [i for i, each in enumerate(size) if each <= config.bits * weight.numel()]
            at = max(fits, key=size.__getitem__) if fits else min(range(len(size)), key=size.__getitem__)
        else:
            at = int(choice)
        kind, options = candidates_of(config)[at]
        return kind.from_weight(weight, options, bias=bias, dtype=dtype, statistics=statistics, generator=generator)


def _measured(model: torch.nn.Module, config: Mixed, found: list[Place], batches: list) -> list[list[float]]:
    """cost [matrix][candidate]."""
    from .calibration.walk import Forwards, evaluating, statistics_of, white

    candidates = candidates_of(config)
    wanted = MixedStorage.needs(config) - {"loss"}
    rise = _rise(model, config, batches) if config.cost == "loss" else None
    cost, inputs, blind = [], [], []
    with evaluating(model):
        run = Forwards(model, [], batches)
        for place, known in statistics_of(found, wanted, run.whole) if wanted else ((each, None) for each in found):
            weight, row = place.product.dense().detach(), []
            reached = known is not None and known.count > 0
            for kind, options in candidates:
                own = known
                if kind.needs(options) and not reached:
                    options = kind.without_data(options)
                    own = white(place, kind.needs(options))
                dense = kind.from_weight(weight, options, statistics=own, dtype=torch.float32).dequantize()
                if rise is not None:
                    row.append(rise(weight, dense))
                else:
                    row.append(error_of(dense - weight.float(), known if config.cost == "outputs" and reached else None))
            if config.cost == "outputs":
                if reached:
                    inputs.append(float(known.hessian.diagonal().mean()))
                else:
                    blind.append(len(cost))
            cost.append(row)
    for at in blind:
        cost[at] = [each * (sum(inputs) / len(inputs) if inputs else 1.0) for each in cost[at]]
    return cost


def _rise(model: torch.nn.Module, config: Mixed, batches: list) -> Callable[[Tensor, Tensor], float]:
    """rise(weight, other): how much the mean next-token loss grows with other values in the place of one weight, which is put back."""
    from .calibration.sensitivity import has_language_loss, sequences

    if not has_language_loss(model):
        raise UsageError("storage 'mixed', cost: loss needs a model that predicts the next token", remedy="cost: outputs")
    rows = [each for _, each in zip(range(config.rows), sequences(batches))]
    device, training = next(model.parameters()).device, [m for m in model.modules() if m.training]

    def loss() -> float:
        total, count = 0.0, 0
        for ids, labels in rows:
            logits, wanted = model(input_ids=ids.to(device)).logits[0, :-1].float(), labels[0, 1:].to(device)
            total += float(F.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100))
            count += int((wanted != -100).sum())
        if not count:
            raise UsageError("the calibration data has no sequence of two tokens", remedy="give more data")
        return total / count

    model.eval()
    before = loss()
    for module in training:
        module.training = True
    if before != before or before == float("inf"):
        raise UsageError("the model's loss on the calibration data is NaN or infinite",
                         remedy="the model file is damaged, or its dtype too narrow: try dtype bf16 or fp32")

    def rise(weight: Tensor, other: Tensor) -> float:
        kept = weight.clone()
        try:
            weight.copy_(other)
            after = loss()
        finally:
            weight.copy_(kept)
        return max(after - before, 1e-6) if after == after else 1e30

    return rise
