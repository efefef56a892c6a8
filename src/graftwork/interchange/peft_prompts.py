"""Methods that put virtual tokens before the text: PEFT's prompt tuning and prefix tuning. One tensor, `prompt_embeddings`:

    prompt   (m, d), our Z
    prefix   (m, L 2 w): of each virtual token the keys and values of all layers; what PEFT's projection gives, if it trained one

The text takes positions from m on in both, and the virtual tokens are never masked. Rows that are padded on the left differ: PEFT
leaves the padding between prompt and text, here a row is what it is alone.
"""

from __future__ import annotations

from typing import Any

from ..adapters.graft import Graft
from .peft_exchange import BASIC, Exchange, Names, Place, Shapes

_VIRTUAL: dict[str, Any] = {**BASIC, "modules_to_save": None, "num_attention_heads": None, "num_layers": None,
                            "num_transformer_submodules": 1, "num_virtual_tokens": None, "token_dim": None}
#: encoder-decoders have two sets of tokens; whole modules beside virtual tokens have keys of their own in PEFT
_ONLY: dict[str, tuple] = {"num_transformer_submodules": (1, None), "modules_to_save": (None, [])}


def _options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {"num_virtual_tokens": document["num_virtual_tokens"]}


def _document(graft: Graft, names: Names) -> dict[str, Any]:
    """Sizes of the model, as PEFT would find them."""
    config, adapter = graft.model.config.get_text_config(decoder=True), graft.adapters["prefix"]
    return {"num_virtual_tokens": adapter.length, "num_layers": config.num_hidden_layers, "token_dim": adapter.out_features,
            "num_attention_heads": config.num_attention_heads}


def _prefix_document(graft: Graft, names: Names) -> dict[str, Any]:
    """token_dim and heads are those of keys and values."""
    config, sizes = graft.model.config.get_text_config(decoder=True), _document(graft, names)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {**sizes, "num_layers": graft.adapters["prefix"].in_features, "num_attention_heads": heads,
            "encoder_hidden_size": sizes["token_dim"]}


def _prefix_shared(graft: Graft, document: dict[str, Any]) -> dict[str, Place]:
    kv = graft.adapters["prefix"].keys_values()
    return {"prompt_embeddings": Place(kv, (kv.shape[2], kv[:, :, 0].numel()), order=(2, 0, 1, 3))}


PROMPT_TUNING = Exchange(
    "prompt", {**_VIRTUAL, "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
               "tokenizer_kwargs": None, "tokenizer_name_or_path": None},
    _options, _document, lambda adapter, document, weight: {},
    lambda graft, document: {"prompt_embeddings": Place(graft.adapters["prefix"].prompt)}, only=_ONLY)
PREFIX_TUNING = Exchange(
    "prefix", {**_VIRTUAL, "peft_type": "PREFIX_TUNING", "encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
    _options, _prefix_document, lambda adapter, document, weight: {}, _prefix_shared, only=_ONLY)
