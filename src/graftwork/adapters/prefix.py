"""Prefix tuning (arXiv 2101.00190): trained keys and values of m virtual tokens in every layer.

    layer l:  K' = [P_l,K; K],  V' = [P_l,V; V]       P (L, 2, m, w) trained, w = key/value heads * head size

P is what a cache would hold for m tokens before the text, after position encoding and norms; the text takes positions from m
on. Trained: 2 L m w numbers. With `reparametrize` they are the output of a network in training,

    P[:, :, j] = P0[:, :, j] + W_2 tanh(W_1 e_j + b_1) + b_2      e (m, h), W_1 (h, h), W_2 (2 L w, h)

with m h + h^2 + h + 2 L w (h + 1) trained numbers (h: the value of `reparametrize`; 512 in the paper). Only P is saved, in the
form without the network; a loaded graft goes on training P itself. Nothing can be merged.

The start (`init`): `vocab`, keys and values that the frozen model computes for m random tokens (start of the paper's
"real words"), as P or as P0; `random`, P ~ N(0, 0.02^2), or P0 = 0 with the network at its own random start.

Differs from the paper: the direct form is the default, because a start at activations of the model trains without the
network. The virtual tokens are run as placeholders (model_scope.py), so a forward that fills a cache costs m tokens more
than the trained values need; in exchange padding, sliding windows, mixed rows and activation checkpointing are exact.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..registry import MethodConfig, register
from .base import SAVED, TOKENS, TokenChoice
from .model_scope import Decoder, PrefixAdapter

STD = 0.02


class Prefix(MethodConfig):
    """Options of `prefix`; num_virtual_tokens as in PEFT."""

    num_virtual_tokens: int = Field(20, ge=1, description="m, the length of the prefix")
    init: str = Field("vocab", pattern="^(vocab|random)$", description="start: activations of random tokens, or small noise")
    reparametrize: int = Field(0, ge=0, description="h: train the prefix as the output of a network this wide; 0: train it directly")
    modules_to_save: list[str] = Field([], description=SAVED)
    trainable_tokens: TokenChoice = Field([], description=TOKENS)


@register("adapter", "prefix", config=Prefix, title="Prefix-Tuning: Optimizing Continuous Prompts for Generation", paper="2101.00190",
          aliases=("prefix_tuning",), summary="trained keys and values of m virtual tokens in every layer",
          bibtex="@inproceedings{li2021prefix, title={Prefix-Tuning: Optimizing Continuous Prompts for Generation}, author={Li, Xiang "
                 "Lisa and Liang, Percy}, booktitle={ACL}, year={2021}}")
class PrefixTuningAdapter(PrefixAdapter):
    """in_features of its site: layers; out_features: numbers in the keys of one token and layer."""

    reads_prompt = False

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.length, self.init = config.num_virtual_tokens, config.init
        self.shape = (site.in_features, 2, self.length, site.out_features)
        for name in ("kv", "start_kv", "token", "inner", "inner_bias", "outer", "outer_bias"):
            self.register_parameter(name, None)
        if not config.reparametrize:
            self.kv = nn.Parameter(torch.randn(self.shape, generator=generator) * STD)
            return
        h, total = config.reparametrize, 2 * site.in_features * site.out_features
        bound = 1.0 / math.sqrt(h)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.token = nn.Parameter(torch.randn(self.length, h, generator=generator))
        self.inner, self.inner_bias = uniform(h, h), uniform(h)
        self.outer, self.outer_bias = uniform(total, h), uniform(total)
        self.start_kv = nn.Parameter(torch.zeros(self.shape), requires_grad=False)

    @classmethod
    def parameter_count(cls, site, config):
        m, total, h = config.num_virtual_tokens, 2 * site.in_features * site.out_features, config.reparametrize
        return m * h + h * h + h + total * (h + 1) if config.reparametrize else m * total

    @classmethod
    def shape_of(cls, config: Prefix, base: Decoder) -> tuple[int, int]:
        layers, _, _, width = base.keys_values(torch.zeros(1, 1, dtype=torch.int64, device=base.embedding.weight.device)).shape
        return layers, width

    @torch.no_grad()
    def start(self, base: Decoder, generator: torch.Generator) -> None:
        if self.init == "random":
            return
        table = base.embedding.weight
        ids = torch.randint(0, table.shape[0], (1, self.length), generator=generator)
        (self.kv if self.start_kv is None else self.start_kv).copy_(base.keys_values(ids.to(table.device)).float())

    def prefix(self, prompts, base):
        """Placeholders: only their places matter, their keys and values are replaced."""
        return base.embed(prompts.input_ids[:, :1]).detach().expand(-1, self.length, -1)

    def keys_values(self) -> Tensor:
        if self.kv is not None:
            return self.kv
        with torch.autocast(self.token.device.type, enabled=False):
            made = nn.functional.linear(torch.tanh(nn.functional.linear(self.token, self.inner, self.inner_bias)),
                                        self.outer, self.outer_bias)
        layers, _, m, width = self.shape
        return self.start_kv + made.view(m, layers, 2, width).permute(1, 2, 0, 3)

    # -- stored --------------------------------------------------------------------------------------------------------
    def artifact_state(self):
        return {"kv": self.keys_values()}

    def load_artifact_state(self, state):
        if self.kv is None:
            self.kv = nn.Parameter(torch.empty_like(self.start_kv))
            self.start_kv = self.token = self.inner = self.inner_bias = self.outer = self.outer_bias = None
        super().load_artifact_state(state)
