"""Likelihood of the trained tokens of each row: fields nll, terms, terms_right, bytes.

Rows are rendered, masked and cut exactly as for training. With a stride nothing is cut: long rows are scored in windows. A row without a
trained token inside max_length has no fields.
"""

from __future__ import annotations

from ...data import from_examples
from ...errors import DataError
from ...objectives.causal_lm import CausalLMObjective
from ...serving.generate import context_length
from ..likelihood import likelihoods, scored_bytes, windows


def observe(view) -> None:
    settings, config, tasks = view.settings, view.settings.config, view.tasks
    for task in tasks:
        if task.tests is not None and not task.answers:
            raise DataError(f"{task.source}: the row has no solution, so its likelihood is unknown",
                            remedy="add 'canonical_solution', or leave the loss out: --metrics pass_at_k")
    dataset = from_examples(view.tokenizer, [task.example for task in tasks], train_on=config.train_on,
                            max_length=config.max_length if settings.stride is None else 2**31 - 1, system=config.system,
                            chat=config.chat, skip_bad=config.skip_bad)
    for note in dataset.statistics.notes:
        view.note(note)
    kept, k = {}, 0
    for i, task in enumerate(tasks):  # the data set's rows are the tasks without those that it left out, in order
        if k < len(dataset) and dataset.sources(k)[0] == task.source:
            kept[i], k = dataset[k], k + 1
    sizes = {i: scored_bytes(view.tokenizer, row) for i, row in kept.items()}
    window = min(settings.window or config.max_length, context_length(view.model) or 2**31)
    parts = {i: [row] if settings.stride is None else windows(row, window, settings.stride) for i, row in kept.items()}
    jobs = [(i, row, graft, part) for i, row, graft in view.jobs() for part in parts.get(i, [])]
    method = getattr(view.objective, "method", "causal_lm")
    by_row = method == "classification" or (method == "metric" and not view.objective.by_token)  # a term is a row (label words)
    found = likelihoods(view.model, view.tokenizer, [part for *_, part in jobs], view.names([graft for _, _, graft, _ in jobs]),
                        batch_size=settings.batch_size, progress=view.say("loss"),
                        objective=view.objective if isinstance(view.objective, CausalLMObjective) else None)
    for (i, row, _, _), one in zip(jobs, found):
        row["nll"] = row.get("nll", 0.0) + one.nll
        row["scored_tokens"] = row.get("scored_tokens", 0) + one.tokens
        row["terms_right"], row["bytes"] = row.get("terms_right", 0) + one.right, sizes[i]
    for i, row, _ in view.jobs():
        if i in kept:
            tokens, right = row["scored_tokens"], row["terms_right"]
            row["terms"], row["terms_right"] = (1, int(right == tokens)) if by_row else (tokens, right)
