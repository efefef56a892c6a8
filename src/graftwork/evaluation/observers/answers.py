"""Answers by greedy decoding: fields prediction, compared, compared_references, correct, finish_reason, tokens.

Each row's last answer is written anew from exactly the tokens that training put before it, every row by its own graft in one batch, and
compared with every accepted answer. What has been written is kept in the journal a few batches at a time.
"""

from __future__ import annotations

from ...data import Renderer
from ...serving.generate import Completion, generate
from ..metrics import extract, matches
from ..tasks import prompt_and_answer


def observe(view) -> None:
    tasks, settings, finder, tokenizer = view.tasks, view.settings, view.settings.finder, view.tokenizer
    if not all(task.answers for task in tasks):
        view.note("rows without a prompt and an answer have no exact match: only the loss is reported")
        return
    renderer = Renderer(tokenizer, train_on="last_assistant", system=settings.config.system, chat=settings.config.chat)
    parts = [prompt_and_answer(renderer, task.example) for task in tasks]
    answers = [list(dict.fromkeys([*task.answers, _text(tokenizer, ids)])) for task, (_, ids) in zip(tasks, parts)]
    limit = settings.max_new_tokens
    if limit is None:
        longest = max(len(renderer.ids(answer)) for row in answers for answer in row)
        limit = min(max(longest + 8, 256 if finder else 1), 1024)
    jobs = view.jobs()
    written = write(view, [parts[i][0] for i, _, _ in jobs], [graft for _, _, graft in jobs], limit, "answers")
    for (i, row, _), completion in zip(jobs, written):
        row.update(prediction=completion.text, correct=matches(completion.text, answers[i], finder),
                   finish_reason=completion.finish_reason, tokens=completion.tokens, compared=extract(completion.text, finder),
                   compared_references=[text.strip() if (cut := extract(text, finder)) is None else cut for text in tasks[i].answers])
    view.also["max_new_tokens"] = limit


def write(view, prompts: list[list[int]], grafts: list[str | None], limit: int, stage: str, *, numbers: list[int] | None = None,
          temperature: float = 0.0, top_p: float = 1.0) -> list[Completion]:
    """Completions of the prompts, those in the journal aside. numbers: of the samples (see `generate`)."""
    settings, journal = view.settings, view.open_journal()
    numbers = numbers if numbers is not None else [0] * len(prompts)
    decoding = [limit, list(settings.stop), temperature, top_p, settings.seed if temperature else 0]
    keys = [journal.key(graft, number, decoding, ids) for ids, graft, number in zip(prompts, grafts, numbers)]
    todo = [i for i, key in enumerate(keys) if key not in journal.known]
    if journal.path is not None and len(todo) < len(prompts):
        view.note(f"{len(prompts) - len(todo)} of {len(prompts)} {stage} were written before")
    chunk = len(todo) if journal.path is None else 8 * settings.batch_size
    done, say = len(prompts) - len(todo), view.say(stage)
    if say:
        say(done, len(prompts))
    for start in range(0, len(todo), max(chunk, 1)):
        part = todo[start:start + chunk]
        found = generate(view.model, view.tokenizer, [prompts[i] for i in part], adapters=view.names([grafts[i] for i in part]),
                         max_new_tokens=limit, stop=settings.stop, batch_size=settings.batch_size, temperature=temperature, top_p=top_p,
                         seed=settings.seed, numbers=[numbers[i] for i in part] if temperature else None,
                         progress=say and (lambda k, _, before=done + start: say(before + k, len(prompts))))
        journal.add({keys[i]: {"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason} for i, c in zip(part, found)})
    return [Completion(**journal.known[key]) for key in keys]


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
