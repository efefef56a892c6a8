"""A tiny byte-level tokenizer with a ChatML template, and file writers, for the tests of graftwork.data."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
          "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
#: the same text, with the answers tagged; the tag leaves <|im_end|> out
TAGGED = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
          "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
          "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TOOLS = ("{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
         "{{ '<|im_end|>\n' }}{% endif %}"
         "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
         "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
         "{{ message['content'] }}"
         "{% for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
         "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(template: str | None = CHATML, *, newline_pairs: bool = False, bos: bool = False, eos: bool = True):
    """Every byte is a token; `newline_pairs` merges two line breaks into one token."""
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    merges = []
    if newline_pairs:
        vocabulary["ĊĊ"] = len(vocabulary)
        merges = [("Ċ", "Ċ")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "<pad>"])
    if bos:
        core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                 special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"pad_token": "<pad>", **({"eos_token": "<|im_end|>"} if eos else {}), **({"bos_token": "<s>"} if bos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, first: str = "user") -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    if first == "system":
        return [{"role": "system", "content": contents[0]}, *chat(*contents[1:])]
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained_text(tokenizer, row: dict) -> str:
    return tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"]) if label != -100])
