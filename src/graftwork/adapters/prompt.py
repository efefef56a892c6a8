"""Prompt tuning (arXiv 2104.08691): m trained embeddings before the text.

    [Z; Emb(x)],   Z (m, d) trained, the same for every text

Trained: m d numbers. Nothing can be merged: the change is to what the model reads, not to a weight. How the virtual tokens get
into the model, beside padding, a cache and rows of other grafts: model_scope.py.

The start of Z (`init`): `vocab`, random rows of the embedding table; `text`, the rows of the tokens of `init_text`,
repeated or cut to m; `random`, U(-0.5, 0.5) as in the paper, large beside the embeddings of most models.

Differs from the paper: `vocab` draws from the whole table, not from its 5,000 most common tokens, which an arbitrary tokenizer
does not tell; the reparametrisations of the code that the paper drops are not here.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import nn

from ..errors import UsageError
from ..modeling.protocols import has_values
from ..registry import MethodConfig, register
from .base import SAVED, TOKENS, TokenChoice
from .model_scope import Decoder, PrefixAdapter


class Prompt(MethodConfig):
    """Options of `prompt`; num_virtual_tokens as in PEFT."""

    num_virtual_tokens: int = Field(20, ge=1, description="m, the length of the prompt")
    init: str = Field("vocab", pattern="^(vocab|text|random)$", description="start: rows of the embedding, a text, or random")
    init_text: str | None = Field(None, description="the text of init: text")
    modules_to_save: list[str] = Field([], description=SAVED)
    trainable_tokens: TokenChoice = Field([], description=TOKENS)

    @model_validator(mode="after")
    def _text(self):
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init_text goes with init: text, and init: text needs it")
        return self


@register("adapter", "prompt", config=Prompt, title="The Power of Scale for Parameter-Efficient Prompt Tuning", paper="2104.08691",
          aliases=("prompt_tuning",), summary="m trained embeddings before the text",
          bibtex="@inproceedings{lester2021power, title={The Power of Scale for Parameter-Efficient Prompt Tuning}, author={Lester, "
                 "Brian and Al-Rfou, Rami and Constant, Noah}, booktitle={EMNLP}, year={2021}}")
class PromptAdapter(PrefixAdapter):
    reads_prompt = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.length, self.init, self.init_text = config.num_virtual_tokens, config.init, config.init_text
        self.prompt = nn.Parameter(torch.rand(self.length, site.out_features, generator=generator) - 0.5)

    @classmethod
    def parameter_count(cls, site, config):
        return config.num_virtual_tokens * site.out_features

    @classmethod
    def width_of(cls, config: Prompt, base: Decoder) -> int:
        return base.width

    @torch.no_grad()
    def start(self, base: Decoder, generator: torch.Generator) -> None:
        table = base.embedding.weight
        if self.init == "random" or not has_values(table):
            return
        if self.init == "text":
            ids = base.tokenizer()(self.init_text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise UsageError(f"init_text {self.init_text!r} has no tokens", remedy="give a text with words")
            rows = torch.tensor((ids * -(-self.length // len(ids)))[: self.length])
        else:
            rows = torch.randint(0, table.shape[0], (self.length,), generator=generator)
        self.prompt.copy_(base.embed(rows.to(table.device)).float())

    def prefix(self, prompts, base):
        return self.prompt.expand(prompts.input_ids.shape[0], -1, -1)
