"""Programs that the model writes, run against the tests of their row: fields programs, passed, reasons.

A program is put together from what was written: of an answer with a fenced block the first block, else the answer itself, cut where the
next top-level statement begins that belongs to no function (STOPS). Where the row names a function (`entry_point`) that the text does not
define, the prompt stands before it, as HumanEval means it. Then come the tests.
"""

from __future__ import annotations

import re

from ...data import Renderer
from ...errors import UsageError
from ..sandbox.runner import check_allowed, missing, run_programs
from ..tasks import prompt_and_answer
from .answers import write

#: longest program, in tokens, unless the user says otherwise
LONGEST = 512
#: where a completion of a function goes on to something else (HumanEval's own stops)
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def observe(view) -> None:
    code = view.settings.code
    check_allowed(code.allowed)
    bare = next((task for task in view.tasks if task.tests is None), None)
    if bare is not None:
        raise UsageError(f"{bare.source} has no tests", remedy='pass_at_k wants rows {"prompt", "test", "entry_point"}')
    renderer = Renderer(view.tokenizer, train_on="last_assistant", system=view.settings.config.system, chat=view.settings.config.chat)
    prompts = [prompt_and_answer(renderer, task.example)[0] for task in view.tasks]
    jobs = [(i, row, graft, sample) for i, row, graft in view.jobs() for sample in range(code.samples)]
    written = write(view, [prompts[i] for i, *_ in jobs], [graft for _, _, graft, _ in jobs], view.settings.max_new_tokens or LONGEST,
                    "programs", numbers=[sample * len(view.tasks) + i for i, _, _, sample in jobs], temperature=code.temperature,
                    top_p=code.top_p)
    sources = [program(view.tasks[i], completion.text) for (i, *_), completion in zip(jobs, written)]
    outcomes = run_programs([f"{source}\n{view.tasks[i].tests.source}" for (i, *_), source in zip(jobs, sources)], workers=code.workers,
                            progress=view.say("tests"), allowed=code.allowed, seconds=code.seconds, memory_mib=code.memory_mib)
    for (_, row, _, _), source, outcome in zip(jobs, sources, outcomes):
        row.setdefault("programs", []).append(source)
        row.setdefault("passed", []).append(outcome.passed)
        row.setdefault("reasons", []).append(outcome.reason)
    layers = next((outcome.layers for outcome in outcomes if outcome.layers), ())
    for text in missing(layers) if layers else ["no program said which layers of the sandbox were in force"]:
        view.note(f"sandbox: {text}")
    view.also["sandbox"] = list(layers)


def program(task, text: str) -> str:
    """The source that is tested, without the tests."""
    fenced = _FENCE.search(text)
    source = fenced[1] if fenced else text
    entry, prompt = task.tests.entry_point, task.example.prompt or ""
    if entry is None or re.search(rf"^(async )?def {entry}\b", source, re.MULTILINE):
        return source
    cut = min((at for stop in STOPS if (at := source.find(stop)) >= 0), default=len(source))
    return prompt + source[:cut]
