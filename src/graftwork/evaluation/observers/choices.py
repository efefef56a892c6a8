"""Likelihoods of the choices of each row behind its prompt: fields choice_nll, choices, chosen, right, choice_accuracy, ..._norm.

Each choice is rendered as the answer of the row, as training renders it; the tokens that end the answer are not scored. All choices of
all rows under all grafts go through the model in common batches.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...data import Renderer
from ...errors import DataError, UsageError
from ...serving.generate import context_length
from ..likelihood import likelihoods
from ..tasks import prompt_and_answer


def observe(view) -> None:
    renderer = renderer_of(view)
    rows = {i: [_scored(renderer, task, text, view) for text in task.choices.texts] for i, task in enumerate(view.tasks)}
    jobs = [(row, graft, part) for i, row, graft in view.jobs() for part in rows[i]]
    found = iter(likelihoods(view.model, view.tokenizer, [part for *_, part in jobs], view.names([graft for _, graft, _ in jobs]),
                             batch_size=view.settings.batch_size, progress=view.say("choices")))
    for i, row, _ in view.jobs():
        choices = view.tasks[i].choices
        nll = np.array([next(found).nll for _ in choices.texts])
        best, normed = int(nll.argmin()), int((nll / [len(text.encode()) for text in choices.texts]).argmin())
        row.update(choice_nll=nll.tolist(), choices=list(choices.texts), right=choices.right, chosen=best,
                   choice_accuracy=best == choices.right, choice_accuracy_norm=normed == choices.right)
        if row["prediction"] is None:
            row["prediction"], row["correct"] = choices.texts[best], best == choices.right


def renderer_of(view) -> Renderer:
    """Raises UsageError unless all rows have choices."""
    bare = next((task for task in view.tasks if task.choices is None), None)
    if bare is not None:
        raise UsageError(f"{bare.source} has no choices", remedy='multiple choice wants rows {"prompt", "choices": [...], "answer"}')
    return Renderer(view.tokenizer, train_on="last_assistant", system=view.settings.config.system, chat=view.settings.config.chat)


def with_answer(task, text: str):
    """The row's example with another answer."""
    if task.example.messages is not None:
        *before, last = task.example.messages
        return replace(task.example, messages=(*before, {**last, "content": text}))
    return replace(task.example, completion=task.choices.separator + text)


def without_ending(renderer: Renderer, ids: list[int]) -> list[int]:
    """The tokens of an answer without those that end it."""
    stop = len(ids)
    while stop > 1 and ids[stop - 1] in renderer.special:
        stop -= 1
    return ids[:stop]


def _scored(renderer: Renderer, task, text: str, view) -> dict:
    prompt, answer = prompt_and_answer(renderer, with_answer(task, text))
    answer, room = without_ending(renderer, answer), context_length(view.model)
    if room is not None and len(prompt) + len(answer) > room:
        raise DataError(f"{task.source}: prompt and choice have {len(prompt) + len(answer)} tokens, the model's context {room}",
                        remedy="shorten the prompt")
    if not prompt:
        raise DataError(f"{task.source}: the prompt has no token, so nothing stands before the choices", remedy="write a prompt")
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
