"""Tokens to text as they come: no half characters, and nothing that may yet become a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """The text of a growing list of tokens, decoded in windows so that a long answer costs no more per token than a short one.

    A piece of text is settled once the tokens behind it decode to whole characters; the window before the last settled token
    is decoded along, since tokenizers join words differently at the beginning of a text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""  # settled
        self.stopped = False
        self._begin = self._settled = 0  # the window, and what of it is in `text`
        self._sent = 0

    def add(self, tokens: Sequence[int], final: bool = False) -> None:
        """tokens: all tokens of the answer so far, the one that ended it aside. final: no more will come."""
        if self.stopped:
            return
        before = self._decode(tokens[self._begin: self._settled])
        now = self._decode(tokens[self._begin:])
        if now.endswith("\ufffd") and not final:
            return
        seen = len(self.text)
        self.text += now[len(before):]
        self._begin, self._settled = self._settled, len(tokens)
        reach = max((len(s) for s in self.stop), default=0)
        places = [at for s in self.stop if (at := self.text.find(s, max(0, seen - reach))) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def take(self, final: bool = False) -> str:
        """What may be shown that was not taken before; the beginning of a stop text is held back until it is decided."""
        held = 0 if final or self.stopped else max(
            (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        end = max(self._sent, len(self.text) - held)
        piece, self._sent = self.text[self._sent: end], end
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
