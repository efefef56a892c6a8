"""Answers held to a grammar: JSON schema, regular expression or Lark grammar, through llguidance (extra `serve`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError

KINDS = ("json_schema", "json_object", "regex", "grammar")


class Guides:
    """Grammars over one tokenizer. Raises UsageError where llguidance is not installed."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]):
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise UsageError("answers held to a grammar need llguidance", remedy="pip install 'graftwork[serve]'") from None
        self._matcher = LLMatcher
        size = max(vocabulary, len(tokenizer))
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(ends) or None)

    def make(self, spec: Mapping[str, Any]) -> Guide:
        """The guide of {"json_schema": schema}, {"json_object": True}, {"regex": text} or {"grammar": Lark text}."""
        if len(spec) != 1 or next(iter(spec)) not in KINDS:
            raise UsageError(f"a guide is one of {', '.join(KINDS)}, not {', '.join(spec) or 'nothing'}", remedy="name exactly one of them")
        (kind, value), = spec.items()
        matcher = self._matcher
        try:
            if kind == "json_schema":
                grammar = matcher.grammar_from_json_schema(value if isinstance(value, str) else json.dumps(value))
            elif kind == "json_object":
                grammar = matcher.grammar_from_json_schema('{"type": "object"}')
            elif kind == "regex":
                grammar = matcher.grammar_from_regex(value)
            else:
                grammar = matcher.grammar_from_lark(value)
            made = matcher(self._tokenizer, grammar)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"the {kind} cannot be used: {error}", remedy="correct it") from None
        if made.is_error():
            raise UsageError(f"the {kind} cannot be used: {made.get_error()}", remedy="correct it")
        return Guide(made)


class Guide:
    """The grammar's state in one answer."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf where the grammar forbids the token."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: logits.shape[0]].astype(bool))
        if allowed.shape[0] < logits.shape[0]:  # rows of the head that the tokenizer does not have
            allowed = torch.cat([allowed, allowed.new_zeros(logits.shape[0] - allowed.shape[0])])
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
