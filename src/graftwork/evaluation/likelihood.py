"""Log-likelihoods of token rows, many grafts in one pass.

Rows are sorted by length and cut into batches; row i runs under `routing`, so a batch holds the same text under several grafts beside
each other, with little padding. The output head runs at scored positions only, in chunks (objectives/causal_lm.py); terms are summed
in float64. A row longer than a window is scored in windows of W tokens that move by S < W: each token once, from at least W - S tokens
before it (or all that there are), which is how perplexity of long texts is made comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data import pad_token_of
from ..data.collate import Collator
from ..errors import UsageError
from ..modeling.state import state_of
from ..objectives.causal_lm import CausalLMObjective


class Likelihood(NamedTuple):
    """nll: sum of -log p over the scored tokens; tokens: their number; right: how many of them were the most probable ones."""

    nll: float
    tokens: int
    right: int


def likelihoods(model: nn.Module, tokenizer: Any, rows: Sequence[dict], names: Sequence[str | None] | None, *, batch_size: int,
                objective: CausalLMObjective | None = None, progress: Callable[[int, int], None] | None = None) -> list[Likelihood]:
    """Of each row {"input_ids", "labels" (-100 where not scored)} under the graft of that name (None: the bare base); names None: the
    model as it stands. progress(done, total)."""
    objective, collate = objective or CausalLMObjective(), Collator(pad_token_of(tokenizer))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # stable: a text's grafts stay beside each other
    found: list[Likelihood | None] = [None] * len(rows)
    device, was_training = model.get_input_embeddings().weight.device, model.training
    model.eval()
    try:
        if progress:
            progress(0, len(order))
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            batch = collate([{key: rows[i][key] for key in ("input_ids", "labels")} for i in chosen])
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            routed = tuple(names[i] for i in chosen) if names is not None else None
            with torch.no_grad(), state_of(model).scope(rows=routed, labels=batch["labels"]):
                _, terms, right, row, _ = objective.terms(model, batch, 1.0, 0.0, count=True)
            sums = torch.zeros(len(chosen), 3, dtype=torch.float64, device=device)
            sums.index_add_(0, row, torch.stack([terms.double(), torch.ones_like(terms).double(), right.double()], 1))
            for i, (nll, tokens, hits) in zip(chosen, sums.tolist()):
                found[i] = Likelihood(nll, int(tokens), int(hits))
            if progress:
                progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return found


def windows(row: dict, window: int, stride: int) -> list[dict]:
    """The row cut into windows; their scored tokens are disjoint and together those of the row.

    Raises UsageError unless 1 <= stride < window."""
    if not 1 <= stride < window:
        raise UsageError(f"a stride of {stride} in windows of {window} tokens", remedy="--stride at least 1 and below --window")
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) <= window:
        return [{"input_ids": ids, "labels": labels}]
    found, scored = [], 0
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        own = [-100] * (scored - start) + labels[scored:stop]
        if any(label != -100 for label in own):
            found.append({"input_ids": ids[start:stop], "labels": own})
        scored = stop
        if stop == len(ids):
            break
    return found


def scored_bytes(tokenizer: Any, row: dict) -> int:
    """Bytes (UTF-8) of the text of a row's scored tokens, special tokens aside. What stands before a span is decoded with it, since
    decoders drop the space at the start of a text, and one character may be spread over tokens on both sides."""
    ids, scored, total, i = list(row["input_ids"]), [label != -100 for label in row["labels"]], 0, 0

    def size(count: int) -> int:
        text = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    while i < len(ids):
        if not scored[i]:
            i += 1
            continue
        stop = next((k for k in range(i, len(ids)) if not scored[k]), len(ids))
        total += max(size(stop) - size(i), 0)
        i = stop
    return total
