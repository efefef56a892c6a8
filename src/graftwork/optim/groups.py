"""Parameter groups with roles: which weights a projecting optimizer may compress, and which get weight decay.

A group is a dict as PyTorch knows it, with two more keys: `role` ("linear": weights of linear maps inside the blocks, which
projecting optimizers compress; anything else gets the plain rule) and `lr_scale` (the group's factor on the learning rate,
LoRA+ for instance).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..modeling.trained_codes import codes_of

_HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls"}


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.0,
                     trainable: Iterable[nn.Parameter] | None = None) -> list[dict[str, Any]]:
    """Groups of a model's parameters: linear maps of the blocks, the rest with decay, the rest without (everything 1-D).

    Args:
        model: any module. A weight is "linear" if it is 2-D, owned by a Linear or Conv1D whose dotted name passes through a
            numbered block (`layers.3.`), and not an output head. A model without numbered blocks counts all its linears.
        weight_decay: decay of the tensors with at least two dimensions.
        trainable: the parameters that will ever train. By default those with `requires_grad` now; a selection that freezes
            layers for a while passes all of them, because a parameter in no group never trains. Frozen ones cost nothing:
            state is allocated at a parameter's first gradient.

    Returns: groups in a fixed order, empty ones left out; each parameter once, tied ones under their first name.

    Raises: UsageError if nothing is trainable.
    """
    chosen = None if trainable is None else {id(p) for p in trainable}
    head = _output_head(model)
    linears = {name for name, module in model.named_modules() if _is_linear(module)}
    numbered = {name for name in linears if any(part.isdigit() for part in name.split("."))} or linears
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {("linear", True): [], ("other", True): [], ("other", False): []}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if id(p) in seen or not (p.requires_grad if chosen is None else id(p) in chosen):
                continue
            seen.add(id(p))
            inside = name in numbered and key == "weight" and p.ndim == 2
            is_head = module is head or name.rpartition(".")[2] in _HEADS
            groups["linear" if inside and not is_head else "other", p.ndim >= 2].append(p)
    if not seen:
        raise UsageError("the model has no trainable parameter", remedy="attach an adapter, or call requires_grad_(True)")
    return [{"params": params, "role": role, "weight_decay": weight_decay if decays else 0.0}
            for (role, decays), params in groups.items() if params]


def as_groups(source: Any, *, weight_decay: float, trainable: Iterable[nn.Parameter] | None = None) -> list[dict[str, Any]]:
    """Groups from a model, a list of groups (taken as they are), or a list of parameters.

    Bare parameters carry no names, so every 2-D one counts as "linear": pass the model to keep embeddings out.
    """
    if isinstance(source, nn.Module):
        return parameter_groups(source, weight_decay=weight_decay, trainable=trainable)
    items = list(source)
    if trainable is not None:
        raise UsageError("`trainable` goes with a model", remedy="pass the model, or only the groups that train")
    if items and all(isinstance(item, dict) for item in items):
        return items
    if not items or not all(isinstance(item, torch.Tensor) for item in items):
        raise UsageError("expected a model, a non-empty list of parameters, or a list of parameter groups")
    split = [([p for p in items if p.ndim >= 2], weight_decay), ([p for p in items if p.ndim < 2], 0.0)]
    return [{"params": params, "role": "linear", "weight_decay": decay} for params, decay in split if params]


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear; it is recognised by name so that Transformers need not be imported.
    return (isinstance(module, nn.Linear) or codes_of(module._parameters.get("weight")) is not None
            or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__))


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:
        return None
