"""What a GGUF model file says besides its tensors: sizes of the model and the tokenizer.

A base that came as GGUF keeps its own metadata, key by key. For other bases the sizes are written from the config and the
tokenizer from its tokenizer.json: byte-level BPE only, and only with a way of splitting text before BPE that llama.cpp knows
by name (`tokenizer.ggml.pre`); a wrong name there gives other tokens than in training without any message, so everything
else is refused.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import IncompatibleError

#: Transformers' model type -> GGUF architecture name
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2",
                 "gemma": "gemma", "gemma2": "gemma2"}
#: those whose sizes are written from the config
SIZED = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
_TOOLS = "convert --to merged, then run llama.cpp's convert_hf_to_gguf.py on that folder"


def architecture(model: Any) -> str:
    """GGUF's name of the model's architecture. Raises IncompatibleError for one whose layout is not known here."""
    kind = getattr(model.config, "model_type", "")
    if kind not in ARCHITECTURES:
        raise IncompatibleError(f"the GGUF layout of '{kind}' models is not known here (known: {', '.join(ARCHITECTURES)})",
                                remedy="convert --to peft, then run llama.cpp's convert_lora_to_gguf.py; or --to merged and "
                                       "convert_hf_to_gguf.py")
    return ARCHITECTURES[kind]


def copy_fields(writer: Any, reader: Any) -> None:
    """All metadata of a GGUF file but what describes its tensors."""
    import gguf

    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in skipped or key.startswith("split."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)


def write_sizes(writer: Any, config: Any, name: str) -> None:
    """Sizes of the model from its Transformers config."""
    kind = config.model_type
    if kind not in SIZED:
        raise IncompatibleError(f"GGUF metadata of '{kind}' models is only carried over from a GGUF base", remedy=_TOOLS)
    writer.add_type("model")
    writer.add_name(name)
    if kind == "gpt2":
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_vocab_size(config.vocab_size)
        return
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise IncompatibleError(f"the rotary scaling '{rope['rope_type']}' is only carried over from a GGUF base", remedy=_TOOLS)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0))
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(config.sliding_window)


def pre_tokenizer(document: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text before BPE. Raises IncompatibleError when there is none."""
    def refuse(what: str) -> IncompatibleError:
        return IncompatibleError(f"this tokenizer cannot be written to GGUF: {what}", remedy=_TOOLS)

    model, normal, pre = document["model"], document.get("normalizer"), document.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise refuse("only byte-level BPE is written")
    if normal is not None and normal["type"] != "NFC":
        raise refuse(f"its normalizer is {normal['type']}")
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise refuse("its text is not split byte-level, without a space in front")
    regex = last.get("use_regex", True)
    if len(steps) == 1 and regex:
        return "gpt-2"
    if len(steps) == 2 and regex and steps[0] == {"type": "Digits", "individual_digits": True}:
        return "smollm"
    if len(steps) == 2 and not regex and steps[0].get("type") == "Split":
        name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
        if name and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return name
    raise refuse("llama.cpp has no name for its way of splitting text")


def write_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Tokens, types, merges, special ids and the chat template of a fast byte-level BPE tokenizer."""
    import gguf

    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise IncompatibleError("a GGUF model needs a tokenizer.json, and this base has none", remedy=_TOOLS)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer(document)
    kinds, names = gguf.TokenType, {i: t for t, i in document["model"]["vocab"].items()}
    types = {i: kinds.NORMAL for i in names}
    for added in document.get("added_tokens", []):
        names[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    size = max(vocabulary, max(names) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([int(types.get(i, kinds.UNUSED)) for i in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]])
    for add, token in ((writer.add_bos_token_id, tokenizer.bos_token_id), (writer.add_eos_token_id, tokenizer.eos_token_id),
                       (writer.add_unk_token_id, tokenizer.unk_token_id), (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if token is not None:
            add(token)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    if getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(tokenizer.chat_template)
