"""Tiny random models for all tests: seeded, 2 layers, fp32, eval mode; the global random state is left as it was.

Vocabulary 128, hidden 64, 4 heads on 2 key/value heads, intermediate 96. `tokenizer()` fits them (ids below 128) and
has a ChatML template. `save(model, folder)` makes a Transformers folder.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB, HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 128, 64, 4, 2, 96, 2
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def _build(auto: str, config: Any, seed: int, dtype: Any = None) -> Any:
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config, dtype=dtype or torch.float32)
        for weight in model.parameters():  # zero biases and unit norms would hide mistakes
            if weight.dim() == 1:
                with torch.no_grad():
                    weight.add_(torch.randn(weight.shape) * 0.05)
    return model.eval()


def _shape(**more: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, max_position_embeddings=256, **more)


def llama_config(gqa: bool = True, tied: bool = True, **more: Any) -> Any:
    from transformers import LlamaConfig

    sizes = _shape(num_key_value_heads=KV_HEADS if gqa else HEADS, tie_word_embeddings=tied, initializer_range=0.1, **SPECIAL)
    return LlamaConfig(**{**sizes, **more})


def llama(gqa: bool = True, tied: bool = True, seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """Llama: grouped-query attention, gated MLP, RMS norms; tied head unless told otherwise."""
    return _build("AutoModelForCausalLM", llama_config(gqa, tied, **more), seed, dtype)


def gpt2(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """GPT-2: Conv1D (transposed weights), fused qkv, biases, tied head. No dropout."""
    from transformers import GPT2Config

    sizes = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN, n_positions=256,
                 initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL)
    return _build("AutoModelForCausalLM", GPT2Config(**{**sizes, **more}), seed, dtype)


def qwen3(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """Qwen3: QK norms, a head size (32) that is not hidden / heads, untied head."""
    from transformers import Qwen3Config

    sizes = _shape(num_key_value_heads=KV_HEADS, head_dim=32, tie_word_embeddings=False, initializer_range=0.1, **SPECIAL)
    return _build("AutoModelForCausalLM", Qwen3Config(**{**sizes, **more}), seed, dtype)


def mixtral(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """Mixtral: 4 experts, 2 a token, kept as fused 3-D parameters; saved files hold one tensor per expert."""
    from transformers import MixtralConfig

    sizes = _shape(num_key_value_heads=KV_HEADS, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
                   initializer_range=0.1, **SPECIAL)
    return _build("AutoModelForCausalLM", MixtralConfig(**{**sizes, **more}), seed, dtype)


def qwen3_moe(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """Qwen3-MoE: 4 experts of 48 channels, 2 a token; saved files hold one tensor per expert (gate_proj, up_proj, down_proj)."""
    from transformers import Qwen3MoeConfig

    sizes = _shape(num_key_value_heads=KV_HEADS, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                   norm_topk_prob=True, tie_word_embeddings=False, initializer_range=0.1, **SPECIAL)
    return _build("AutoModelForCausalLM", Qwen3MoeConfig(**{**sizes, **more}), seed, dtype)


def deepseek_v3(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """DeepSeek-V3: latent attention, one dense block, then 4 experts of 96 channels in 2 groups and a shared one."""
    from transformers import DeepseekV3Config

    sizes = _shape(num_key_value_heads=HEADS, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
                   n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, n_shared_experts=1, n_group=2, topk_group=1,
                   first_k_dense_replace=1, tie_word_embeddings=False, initializer_range=0.1, **SPECIAL)
    return _build("AutoModelForCausalLM", DeepseekV3Config(**{**sizes, **more}), seed, dtype)


def gpt_oss(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """gpt-oss: experts with biases, transposed, gate and up by turns; attention with sinks and biases, one layer of two in a window."""
    from transformers import GptOssConfig

    sizes = _shape(num_key_value_heads=KV_HEADS, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False, initializer_range=0.1,
                   **SPECIAL)
    model = _build("AutoModelForCausalLM", GptOssConfig(**{**sizes, **more}), seed, dtype)
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj_bias"):
                weight.add_((torch.randn(weight.shape, generator=generator) * 0.05).to(weight.dtype))
    return model


def bert_config(**more: Any) -> Any:
    from transformers import BertConfig

    sizes = _shape(pad_token_id=0, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertConfig(**{**sizes, **more})


def bert(seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """BERT encoder: biases, layer norms, full attention."""
    return _build("AutoModel", bert_config(**more), seed, dtype)


def bert_classifier(num_labels: int = 3, seed: int = 0, dtype: Any = None, **more: Any) -> Any:
    """BERT with a classification head."""
    return _build("AutoModelForSequenceClassification", bert_config(num_labels=num_labels, **more), seed, dtype)


#: name -> builder, for tests parametrised over causal models
CAUSAL = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3, "mixtral": mixtral}
ALL = {**CAUSAL, "bert": bert}


@lru_cache(maxsize=1)
def _backend() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    letters = [chr(c) for c in range(33, 127)]  # printable ASCII, then the byte-level names of space and newline, then merges
    parts = special + letters + ["Ġ", "Ċ"]
    pairs = ("t h,th e,Ġ the,i n,e r,o n,a n,an d,r e,Ġ a,u s,us er,l e,o r,s t,e n,a t,e s,o u,Ġ s,Ġ t,i s,e d,i t,a l,a r,"
             "a s,l l")
    merges = [tuple(pair.split(" ")) for pair in pairs.split(",")]
    vocabulary = {token: index for index, token in enumerate(parts + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


def tokenizer() -> Any:
    """A byte-level BPE of exactly 128 tokens: ASCII round-trips, other characters become `<unk>`. ChatML template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend()), pad_token="<pad>", bos_token="<|im_start|>",
                                   eos_token="<|im_end|>", unk_token="<unk>", model_max_length=256)
    made.chat_template = CHATML
    return made


def tokens(rows: int = 2, length: int = 8, seed: int = 0) -> Any:
    """Random token ids, int64 (rows, length), none of them special."""
    import torch

    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def save(model: Any, folder: str | Path, *, with_tokenizer: bool = True, **options: Any) -> Path:
    """Saves a Transformers folder (config, safetensors, tokenizer) and returns it. `options` go to `save_pretrained`."""
    folder = Path(folder)
    model.save_pretrained(folder, **options)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder
