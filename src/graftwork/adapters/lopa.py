"""LoPA: low-rank prompt adaptation (arXiv 2405.15282): a soft prompt that depends on the instance.

    e = Enc(x) / rms(Enc(x))                                    (h,)    frozen encoder of the prompt x, no gradient
    U = reshape(W_r2 tanh(W_r1 drop(e) + b_r1) + b_r2)          (m, r)
    V = reshape(W_c2 tanh(W_c1 drop(e) + b_c1) + b_c2)          (d, r)
    Z = Z_S * sigmoid(U V^T)                                    (m, d)  embeddings of m virtual tokens before the text

Trained: Z_S (m, d), W_r1 and W_c1 (h, h), W_r2 (m r, h), W_c2 (d r, h) and their biases: m d + 2 (h^2 + h) + (h + 1) r (m + d)
numbers. Start: weights N(0, 0.02), biases 0, so the gate is about 1/2 everywhere; Z_S takes random rows of the base's
embedding. Prompt tuning is the case sigmoid = 1. Nothing can be merged: the change depends on the input.

The encoder: `base`, the frozen model itself (state of the last prompt token; one more forward of the prompt without
gradient, in training on the width of the whole batch); `embeddings`, the mean of the prompt's input embeddings (almost free,
blind to word order); or an encoder model by name or folder, which reads the decoded text of the prompt with its own tokenizer
(mean of its last states). In training x is the prompt without the answer, as at generation (model_scope.py). Encoder weights
are not saved; an artifact binds to the encoder by its fingerprint.

Differs from the paper: e is scaled to root mean square 1 for every encoder (the official code does so for one of them, by
norm), since the states of language models are large enough to saturate tanh at the start. Z_S starts at rows of the
embedding table and not at N(0, 1), which is many times larger than a token's embedding. The head is computed in fp32: it
sees one vector a row, and a cast of its weights would cost more than its product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import ArtifactError
from ..registry import MethodConfig, register
from .base import SAVED, TOKENS, TokenChoice
from .model_scope import Decoder, PrefixAdapter, Prompts
from .text_encoder import TextEncoder, masked_mean

STD = 0.02


class LoPA(MethodConfig):
    """Options of `lopa`; num_virtual_tokens as in PEFT."""

    num_virtual_tokens: int = Field(10, ge=1, description="m, the length of the prefix")
    r: int = Field(4, ge=1, description="rank of the gate")
    encoder: str = Field("base", min_length=1, description="base, embeddings, or an encoder model by name or folder")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the instance vector, in training")
    modules_to_save: list[str] = Field([], description=SAVED)
    trainable_tokens: TokenChoice = Field([], description=TOKENS)


@register("adapter", "lopa", config=LoPA, title="LoPA: Prompt Tuning Strikes Back, Low-Rank Prompt Adaptation",
          paper="2405.15282", summary="virtual tokens before the text, gated by a low-rank function of the prompt",
          bibtex="@inproceedings{jain2024lopa, title={Prompt Tuning Strikes Back: Customizing Foundation Models with Low-Rank "
                 "Prompt Adaptation}, author={Jain, Abhinav and Chaudhuri, Swarat and Reps, Thomas and Jermaine, Chris}, "
                 "booktitle={NeurIPS}, year={2024}}")
class LoPAAdapter(PrefixAdapter):
    restarts_on_load = True  # the encoder is not saved

    def __init__(self, site, config, *, shared, generator):
        super().__init__(site, config, shared=shared, generator=generator)
        self.length, self.r, self.encoder_ref, self.dropout = config.num_virtual_tokens, config.r, config.encoder, config.dropout
        m, r, h, d = self.length, self.r, site.in_features, site.out_features

        def weight(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, h, generator=generator) * STD)

        self.prompt = nn.Parameter(torch.zeros(m, d))
        self.row_in, self.row_in_bias = weight(h), nn.Parameter(torch.zeros(h))
        self.row_out, self.row_out_bias = weight(m * r), nn.Parameter(torch.zeros(m * r))
        self.column_in, self.column_in_bias = weight(h), nn.Parameter(torch.zeros(h))
        self.column_out, self.column_out_bias = weight(d * r), nn.Parameter(torch.zeros(d * r))
        self.fingerprint: str | None = None  # of a separate encoder, read when the graft is saved or loaded
        self._encoder: list[TextEncoder] = []  # a list, so that the encoder is no child and no part of the state

    @classmethod
    def parameter_count(cls, site, config):
        m, r, h, d = config.num_virtual_tokens, config.r, site.in_features, site.out_features
        return m * d + 2 * (h * h + h) + (h + 1) * m * r + (h + 1) * d * r

    @classmethod
    def width_of(cls, config: LoPA, base: Decoder) -> int:
        if config.encoder in ("base", "embeddings"):
            return base.hidden_size if config.encoder == "base" else base.width
        return _encoder(config.encoder, base).width

    @torch.no_grad()
    def start(self, base: Decoder, generator: torch.Generator) -> None:
        table = base.embedding.weight
        rows = torch.randint(0, table.shape[0], (self.length,), generator=generator)
        self.prompt.copy_(base.embed(rows.to(table.device)).float())
        if self.encoder_ref not in ("base", "embeddings"):
            self._encoder = [_encoder(self.encoder_ref, base)]

    @torch.no_grad()
    def encode(self, prompts: Prompts, base: Decoder) -> Tensor:
        """The instance vectors (n, h) of n prompts: fp32, root mean square 1."""
        if self.encoder_ref == "embeddings":
            e = masked_mean(base.embed(prompts.input_ids), prompts.mask)
        elif self.encoder_ref == "base":
            states = base.states(prompts)
            place = torch.arange(prompts.mask.shape[1], device=prompts.mask.device)
            last = (prompts.mask * place).argmax(1).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
            e = states.gather(1, last).squeeze(1).float()
        else:
            encoder = self._encoder[0]
            e = encoder(prompts.input_ids, prompts.mask, None if encoder.fake else base.tokenizer())
        return e * torch.rsqrt(e.square().mean(-1, keepdim=True) + 1e-12)

    def gate(self, e: Tensor, base: Decoder | None = None) -> tuple[Tensor, Tensor]:
        """(U (n, m, r), V (n, d, r)) of instance vectors e (n, h); with `base` and in training after dropout."""
        found = []
        for part, (w_in, b_in, w_out, b_out) in {
                "row": (self.row_in, self.row_in_bias, self.row_out, self.row_out_bias),
                "column": (self.column_in, self.column_in_bias, self.column_out, self.column_out_bias)}.items():
            x = e
            if base is not None and self.dropout and self.training and torch.is_grad_enabled():
                x = base.noise.dropout(e, self.dropout, f"prefix.{part}")
            found.append(F.linear(torch.tanh(F.linear(x, w_in, b_in)), w_out, b_out).unflatten(-1, (-1, self.r)))
        return found[0], found[1]

    def prefix(self, prompts: Prompts, base: Decoder) -> Tensor:
        with torch.autocast(prompts.input_ids.device.type, enabled=False):
            U, V = self.gate(self.encode(prompts, base), base)
            return self.prompt * torch.sigmoid(U @ V.transpose(1, 2))

    def stored_extra(self):
        if not self._encoder:
            return None
        self.fingerprint = self.fingerprint or self._encoder[0].fingerprint
        return {"encoder": self.encoder_ref, "encoder_fingerprint": self.fingerprint}

    def check_extra(self, extra):
        self.fingerprint = self._encoder[0].fingerprint
        if extra["encoder_fingerprint"] != self.fingerprint:
            raise ArtifactError(f"the graft was trained with another encoder: '{extra['encoder']}' had the fingerprint "
                                f"{extra['encoder_fingerprint'][:16]}, it now has {self.fingerprint[:16]}",
                                remedy="put the encoder it was trained with in that place")


def _encoder(ref: str, base: Decoder) -> TextEncoder:
    if ref not in base.encoders:
        base.encoders[ref] = TextEncoder(ref)
    return base.encoders[ref]
