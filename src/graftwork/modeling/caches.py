"""Where a model keeps what it has read: in a cache that its forward takes, or in places of its own."""

from __future__ import annotations

import inspect

from torch import nn

#: model types that keep the state of their recurrent layers in the layers themselves, or in a cache of their own kind
OWN_STATE = frozenset({"recurrent_gemma", "rwkv", "xlstm"})


def cache_argument(model: nn.Module) -> str | None:
    """The name under which the model's forward takes a Transformers cache; None for models that keep their state elsewhere, where
    rows cannot leave a batch and padding is not masked."""
    known = inspect.signature(type(model).forward).parameters
    own = getattr(getattr(model, "config", None), "model_type", "") in OWN_STATE
    return None if own else next((name for name in ("past_key_values", "cache_params") if name in known), None)
