"""A frozen sentence encoder beside the model: texts to vectors, with a tokenizer of its own.

    e(text) = mean over the text's tokens of the encoder's last hidden states

Its weights belong to the run, not to a graft: an artifact keeps the reference and the fingerprint. Texts longer than the
encoder's context are cut at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


class TextEncoder:
    """ref: a packaged name, a folder, a Hub id; `width` is h. Raises what loading raises, UsageError without a tokenizer."""

    def __init__(self, ref: str):
        from torch._guards import detect_fake_mode

        from ..modeling.models import load_model

        self.ref, self.fake = ref, detect_fake_mode() is not None
        self.model, self.tokenizer = load_model(ref, task="encoder", dtype="fp32", fake=self.fake)
        if self.tokenizer is None:
            raise UsageError(f"the encoder {ref} has no tokenizer", remedy="name a folder that holds one, or encoder: base")
        self.model.requires_grad_(False)
        self.width = self.model.config.hidden_size
        room = getattr(self.model.config, "max_position_embeddings", None) or 512
        self.room = int(min(room, self.tokenizer.model_max_length))
        self._digest: str | None = None

    @property
    def fingerprint(self) -> str:
        from ..modeling.fingerprint import fingerprint

        self._digest = self._digest or fingerprint(self.model)
        return self._digest

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, tokenizer: Any) -> Tensor:
        """Prompts in the decoder's tokens, ids (n, T) int64 and mask (n, T) bool, and the decoder's tokenizer -> (n, h) fp32.

        Under fake tensors no text can be read: the encoder runs on T tokens a row (its own context at most)."""
        if self.fake:
            own = torch.zeros(ids.shape[0], min(ids.shape[1], self.room), dtype=torch.int64, device=ids.device)
            given = torch.ones_like(own)
        else:
            kept = [[token for token, wanted in zip(row, use) if wanted] for row, use in zip(ids.tolist(), mask.tolist())]
            texts = [tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in kept]
            made = self.tokenizer(texts, padding=True, truncation=True, max_length=self.room, return_tensors="pt")
            own, given = made["input_ids"].to(ids.device), made["attention_mask"].to(ids.device)
            if next(self.model.parameters()).device != ids.device:
                self.model.to(ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            states = self.model(input_ids=own, attention_mask=given).last_hidden_state
        return masked_mean(states, given)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of states (n, T, h) over the entries where mask (n, T) is not 0: (n, h) in fp32; 0 where there is none."""
    weight = mask.ne(0).float().unsqueeze(-1)
    return (states.float() * weight).sum(1) / weight.sum(1).clamp(min=1.0)
