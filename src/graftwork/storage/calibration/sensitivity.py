"""Which rows of all matrices a language model feels most when they are rounded (the ranking of MixLLM, arXiv 2412.14590).

For a row w of a site, d = Q(w) - w its error in few bits and g_s the gradient by w of the next-token loss of sequence s (its mean over
the tokens):

    S = sum_s |a_s + a_s^2 / 2|,   a_s = g_s . d

the change of the loss to second order, with g g^T in place of the Hessian. Sequences are run one by one; the gradient of one matrix is
reduced to a number a row and dropped before that of the next exists, and d is made anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...modeling.protocols import is_conv1d
from ..base import Place, StorageConfig, places


def has_language_loss(model: nn.Module) -> bool:
    """Whether the model predicts the next token."""
    config = getattr(model, "config", None)
    return config is not None and hasattr(model, "can_generate") and model.can_generate() and not config.is_encoder_decoder


def sequences(batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids (1, T), labels (1, T)) of every row of the batches, without its padding; labels where a batch has them, else the ids."""
    for batch in batches:
        ids = batch["input_ids"]
        labels = batch.get("labels")
        labels = labels if labels is not None and labels.shape == ids.shape else ids
        mask = batch.get("real_tokens", batch.get("attention_mask"))
        for row in range(len(ids)):
            real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
            if real.sum() > 1:
                yield ids[row][real][None], labels[row][real][None]


def row_salience(model: nn.Module, found: Iterable[Place], batches: Iterable[Mapping[str, Any]],
                 quantized: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """S (out,) fp64 of the rows of every dense map in `found`. quantized(W) -> D(Q(W)), fp32.

    The model's parameters and their gradients are left as they were. Raises UsageError without a sequence of two tokens, or where
    the loss is not finite."""
    sites: dict[nn.Parameter, list[Place]] = {}
    for place in found:
        sites.setdefault(getattr(place.module, place.attribute or "weight"), []).append(place)
    salience = {place.name: torch.zeros(place.product.out_features, dtype=torch.float64) for each in sites.values() for place in each}

    @torch.no_grad()
    def reduce(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        for place in sites[parameter]:
            own = gradient if place.expert is None else gradient[place.expert]
            own = own.T if (is_conv1d(place.module) if place.expert is None else place.product.transposed_source) else own
            weight = place.product.dense().float()
            a = (own.float() * (quantized(weight) - weight)).sum(1, dtype=torch.float64).cpu()
            salience[place.name] += (a + a.square() / 2).abs()

    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training, count = [m for m in model.modules() if m.training], 0
    handles = []
    model.eval()
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
            parameter.requires_grad_(parameter in sites)
        handles = [parameter.register_post_accumulate_grad_hook(reduce) for parameter in sites]
        device = next(model.parameters()).device
        with torch.enable_grad():
            for ids, labels in sequences(batches):
                if not (labels[:, 1:] != -100).any():
                    continue
                logits = model(input_ids=ids.to(device)).logits[0, :-1].float()
                loss = F.cross_entropy(logits, labels[0, 1:].to(device))
                if not torch.isfinite(loss):
                    raise UsageError("the model's loss on the calibration data is NaN or infinite",
                                     remedy="the model file is damaged, or its dtype too narrow: try dtype bf16 or fp32")
                loss.backward()
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, gradient in kept:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module in training:
            module.training = True
    if not count:
        raise UsageError("the calibration data has no sequence of two tokens", remedy="give more data")
    return salience


def top_rows(salience: Mapping[str, Tensor], part: float) -> dict[str, Tensor]:
    """{site: bool (out,)}: the `part` of all rows of all sites with the largest salience; of equal ones the first."""
    scores = torch.cat(list(salience.values()))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[: round(part * len(scores))]] = True
    return dict(zip(salience, chosen.split([len(each) for each in salience.values()])))


def global_rows(model: nn.Module, config: StorageConfig, batches: Iterable[Mapping[str, Any]], quantized: Callable[[Tensor], Tensor],
                part: float) -> dict[str, Tensor]:
    """`top_rows` of everything that config puts into a storage."""
    return top_rows(row_salience(model, places(model, config), batches, quantized), part)
