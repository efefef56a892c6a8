"""Likelihoods of the choices without their prompt, behind "Answer:" alone: field choice_accuracy_pmi.

A choice's own probability is taken off: argmax log p(choice | prompt) - log p(choice | "Answer:"). The context is raw text, also for chat
models; a choice that several rows have is scored once per graft.
"""

from __future__ import annotations

import numpy as np

from ..likelihood import likelihoods
from .choices import renderer_of

CONTEXT = "Answer:"


def observe(view) -> None:
    renderer = renderer_of(view)
    pairs = list(dict.fromkeys((text, graft) for i, _, graft in view.jobs() for text in view.tasks[i].choices.texts))
    prompt = renderer.bos + renderer.ids(CONTEXT)
    rows = []
    for text, _ in pairs:
        answer = renderer.ids(" " + text.lstrip())
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    found = likelihoods(view.model, view.tokenizer, rows, view.names([graft for _, graft in pairs]),
                        batch_size=view.settings.batch_size, progress=view.say("choices alone"))
    alone = {pair: one.nll for pair, one in zip(pairs, found)}
    for i, row, graft in view.jobs():
        choices = view.tasks[i].choices
        gain = np.array([alone[text, graft] for text in choices.texts]) - np.array(row["choice_nll"])
        row["choice_accuracy_pmi"] = int(gain.argmax()) == choices.right
