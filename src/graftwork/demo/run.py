"""`graft demo`: four tasks, four methods, one NF4 base, one mixed batch, one page. Every number it prints it has just measured.

Stages: a run that is killed, and the base (NF4) | how well it does untrained (zero-shot and 4-shot) | plan and train each task,
the killed one resumed | a recipe that is refused | all four adapters and the bare base in one batch | table and report.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import GraftworkError, RecipeError
from ..files import atomic_write_text
from .tasks import TASKS, Task

MODEL = "smollm2-135m-instruct"
#: rows of each task: training, evaluation after, evaluation before (the untrained model's prompts are several times as long),
#: held-out perplexity
TRAIN_ROWS, EVAL_ROWS, BEFORE_ROWS, PERPLEXITY_ROWS = 400, 40, 10, 16
NEEDED_GAIN = 50.0
#: puts the heaviest step of the run that is killed behind its first checkpoint, so that the resumed run can measure it
SEED = 2
#: two logits closer than this may swap when the batch around a row changes
TIE = 1e-4


@dataclass
class Outcome:
    """Everything the demo learned about one task. Scores in percent, sizes in bytes."""

    task: Task
    zero_shot: float = 0.0
    four_shot: float = 0.0
    after: float = 0.0
    perplexity: tuple[float, float] = (0.0, 0.0)
    planned: int = 0
    measured: int = 0
    parameters: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    samples: list[dict[str, Any]] = field(default_factory=list)
    plan: Any = None

    @property
    def before(self) -> float:
        return max(self.zero_shot, self.four_shot)

    @property
    def gain(self) -> float:
        return self.after - self.before


class Demo:
    """One run of the demo in a folder; `run()` returns the exit code."""

    def __init__(self, folder: str | Path, *, quiet: bool = False):
        self.folder, self.quiet = Path(folder), quiet
        self.outcomes = {task.name: Outcome(task) for task in TASKS}
        self.stages: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"[{time.monotonic() - self.start:5.0f} s] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self.say(title)
        start = time.monotonic()
        yield
        self.stages.append((title, time.monotonic() - start))
        self.say(f"  done in {self.stages[-1][1]:.1f} s")

    # -- stages -----------------------------------------------------------------------------------------------------------
    def run(self) -> int:
        from ..api import load
        from ..storage import storage_bits

        self.write_inputs()
        killed = TASKS[0]
        with self.stage(f"a first run of '{killed.name}' that will be killed; its plan meanwhile; then {MODEL} as NF4"):
            victim = self.start_victim(killed)
            try:
                self.plan(killed)
                self.kill(victim, killed)
            finally:
                victim.kill()
            self.model, self.tokenizer = load(MODEL, storage="nf4", dtype="fp32")  # as the killed run has converted it
            self.say(f"  {sum(p.numel() for p in self.model.parameters()):,} stored numbers; "
                     f"{storage_bits(self.model):.3f} bits a weight in the blocks")
        with self.stage("the untrained model: zero-shot with an instruction, and 4-shot"):
            self.before()
        for task in TASKS:
            with self.stage(f"task '{task.name}' ({task.kind}): {task.title}, {task.method} on NF4"):
                self.learn(task, resume=task is killed)
        with self.stage("a recipe that cannot work is refused before anything is loaded"):
            self.refused()
        with self.stage("one batch: four adapters of four methods, and the bare base"):
            self.mixed_batch()
        self.finish()
        return 1 if self.failures else 0

    def write_inputs(self) -> None:
        """Data and recipes, in the folder where one can look at them and run them again."""
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / ".graft-demo").exists():
                raise GraftworkError(f"{self.folder} is not empty and no earlier demo", remedy="choose another folder with --output")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.folder / ".graft-demo", "")
        for task in TASKS:
            for side, n in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
                rows = task.rows(side, n)
                atomic_write_text(self.folder / f"{task.name}.{side}.jsonl",
                                  "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            atomic_write_text(self.recipe_path(task), yaml.safe_dump(self.recipe(task), sort_keys=False, allow_unicode=True))

    def recipe_path(self, task: Task) -> Path:
        return self.folder / f"{task.name}.yaml"

    def recipe(self, task: Task) -> dict[str, Any]:
        """The recipe of a task, as a user would write it."""
        return {
            "model": MODEL, "storage": "nf4", "adapter": {"method": task.method, **task.options},
            "optimizer": {"method": "adamw", "lr": task.learning_rate},
            "data": {"train": str(self.folder / f"{task.name}.train.jsonl"), "format": "completion", "train_on": "completion",
                     "max_length": task.max_length},
            # fp32 compute: a row in the mixed batch can then be compared token by token with the row alone
            "train": {"max_steps": task.steps, "batch_size": task.batch_size, "precision": "fp32", "save_steps": 2, "seed": SEED,
                      "schedule": "cosine", "warmup": 0.1},
            "output_dir": str(self.folder / "runs" / task.name),
        }

    def start_victim(self, task: Task) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "graftwork.cli.main", "train", str(self.recipe_path(task)), "--quiet"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def kill(self, victim: subprocess.Popen, task: Task) -> None:
        """SIGKILL the first run once it has a checkpoint, without warning."""
        from ..training.checkpoint import complete

        run = self.folder / "runs" / task.name
        while not complete(run):
            if victim.poll() is not None:
                raise GraftworkError(f"the first run of '{task.name}' ended by itself: {victim.stderr.read().strip()[-300:]}")
            time.sleep(0.05)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        self.say(f"  killed the run of '{task.name}' (SIGKILL); its newest checkpoint is {complete(run)[-1].name}")

    def before(self) -> None:
        """Zero-shot and 4-shot scores of every task; the tasks share two batches, which costs a fraction of eight."""
        from ..serving.generate import generate

        asked = [(task, example) for task in TASKS for example in task.eval(EVAL_ROWS)[:BEFORE_ROWS]]
        for shots, key in ((0, "zero_shot"), (4, "four_shot")):
            answers = generate(self.model, self.tokenizer, [task.baseline(example, shots) for task, example in asked],
                               max_new_tokens=max(t.max_new_tokens for t in TASKS), batch_size=len(asked))
            for task in TASKS:
                own = [(example, answer) for (t, example), answer in zip(asked, answers) if t is task]
                outcome = self.outcomes[task.name]
                setattr(outcome, key, 100.0 * sum(task.score(a.text, e.answer) for e, a in own) / len(own))
                if not shots:
                    outcome.samples = [{"prompt": e.prompt, "right": e.answer, "before": a.text.strip()[:60]} for e, a in own]
        for outcome in self.outcomes.values():
            self.say(f"  {outcome.task.name}: zero-shot {outcome.zero_shot:.0f} %, 4-shot {outcome.four_shot:.0f} %")

    def plan(self, task: Task) -> None:
        from ..planning.measure import format_bytes
        from ..planning.simulate import plan

        outcome = self.outcomes[task.name]
        outcome.plan = plan(self.recipe_path(task), estimate_time=False)
        outcome.planned = outcome.plan.peak_bytes
        self.say(f"  planned peak {format_bytes(outcome.planned)} of tensors (simulated in {outcome.plan.simulated_in:.1f} s)")

    def learn(self, task: Task, *, resume: bool) -> None:
        from ..artifact import attach_saved
        from ..files import folder_bytes
        from ..planning.measure import format_bytes
        from ..serving.generate import generate
        from ..training.run import train_recipe

        outcome, recipe = self.outcomes[task.name], self.recipe_path(task)
        outcome.perplexity = (self.perplexity(task), 0.0)
        if outcome.plan is None:
            self.plan(task)
        result = train_recipe(recipe, resume=resume, model=self.model, tokenizer=self.tokenizer, label=f"  {task.name}", quiet=self.quiet,
                              say=lambda text: self.say(f"  {text}"))
        outcome.measured, outcome.seconds = result.peak_bytes or 0, result.seconds
        outcome.parameters, outcome.file_bytes = result.grafts[0].parameter_count(), folder_bytes(result.graft)
        for graft in result.grafts:
            graft.detach()
        graft = attach_saved(self.model, result.graft, name=task.name)
        examples = task.eval(EVAL_ROWS)
        answers = generate(self.model, self.tokenizer, [task.question(e) for e in examples], max_new_tokens=task.max_new_tokens,
                           batch_size=EVAL_ROWS)
        right = [task.score(a.text, e.answer) for a, e in zip(answers, examples)]
        outcome.after = 100.0 * sum(right) / len(right)
        outcome.perplexity = (outcome.perplexity[0], self.perplexity(task))
        for sample, answer in zip(outcome.samples, answers):
            sample["after"] = answer.text.strip()
        graft.detach()
        difference = (outcome.planned - outcome.measured) / max(outcome.measured, 1)
        self.say(f"  measured peak {format_bytes(outcome.measured)} (plan {difference:+.1%}), process RSS {format_bytes(_rss())}")
        self.say(f"  exact match {outcome.before:.0f} % -> {outcome.after:.0f} %, held-out perplexity {outcome.perplexity[0]:.1f} -> "
                 f"{outcome.perplexity[1]:.3f}")
        wrong = [(e, a) for e, a, ok in zip(examples, answers, right) if not ok]
        if wrong:
            self.say(f"  an error: {wrong[0][0].prompt!r} -> {wrong[0][1].text.strip()!r}, right: {wrong[0][0].answer!r}")
        else:
            self.say("  an error: none in this evaluation")
        run = self.folder / "runs" / task.name
        atomic_write_text(run / "plan.json", json.dumps({**outcome.plan.to_json(), "timeline": outcome.plan.timeline}))
        atomic_write_text(run / "samples.json", json.dumps(outcome.samples[:8], ensure_ascii=False))
        if outcome.gain < NEEDED_GAIN:
            self.failures.append(f"'{task.name}' gained {outcome.gain:.0f} points, fewer than {NEEDED_GAIN:.0f}")

    def perplexity(self, task: Task) -> float:
        """Of the right answers of the first evaluation rows, given their prompts."""
        from ..data import Example, from_examples
        from ..registry import lookup, make_config
        from ..training.evaluate import evaluate_loss

        rows = [Example(**row) for row in task.rows("eval", PERPLEXITY_ROWS)]
        data = from_examples(self.tokenizer, rows, train_on="completion", max_length=task.max_length)
        objective = lookup("objective", "causal_lm").cls(make_config("objective", "causal_lm"))
        return evaluate_loss(self.model, objective, data, batch_size=PERPLEXITY_ROWS)["perplexity"]

    def refused(self) -> None:
        from ..recipe import load_recipe

        wrong = {**self.recipe(TASKS[0]), "adapter": None, "selection": ["lisa"]}
        try:
            load_recipe(wrong)
        except RecipeError as error:
            self.say(f"  {error.problems[0]}")
            self.say(f"  remedy: {error.remedy}")
        else:
            self.failures.append("a recipe that trains frozen NF4 codes was accepted")

    def mixed_batch(self) -> None:
        """Rows of every adapter and of the base in one batch, against each adapter alone."""
        from ..artifact import attach_saved
        from ..serving.generate import generate

        rows, names, limits = [], [], max(t.max_new_tokens for t in TASKS)
        for task in TASKS:
            for example in task.eval(EVAL_ROWS)[:2]:
                rows.append((task, example, task.question(example)))
                names.append(task.name)
        base_rows = [(task, e, task.baseline(e)) for task in TASKS[:2] for e in task.eval(EVAL_ROWS)[:1]]
        rows, names = [*rows, *base_rows], [*names, *[None] * len(base_rows)]
        for task in TASKS:
            attach_saved(self.model, self.folder / "runs" / task.name / "graft", name=task.name)
        prompts = [prompt for _, _, prompt in rows]
        mixed = generate(self.model, self.tokenizer, prompts, adapters=names, max_new_tokens=limits, batch_size=len(rows), gaps=True)
        ties = different = 0
        for name in dict.fromkeys(names):
            own = [i for i, n in enumerate(names) if n == name]
            for i, alone in zip(own, self.alone(name, [prompts[i] for i in own], [mixed[i].ids for i in own])):
                same = next((k for k, (a, b) in enumerate(zip(mixed[i].ids, alone)) if a != b), None)
                if same is None:
                    continue
                if mixed[i].gaps[same] < TIE:
                    ties += 1
                else:
                    different += 1
                    self.failures.append(f"row {i} ({name or 'bare base'}) differs from the adapter alone at token {same + 1} of "
                                         f"{mixed[i].text!r}")
        for i in [*range(0, len(TASKS) * 2, 2), len(rows) - 1]:
            self.say(f"  {names[i] or 'bare base':>10}: {rows[i][1].prompt!r} -> {mixed[i].text.strip()[:60]!r}")
        self.say(f"  {len(rows)} rows, {len(TASKS)} adapters and the bare base: {len(rows) - ties - different} rows equal to the adapter "
                 f"alone, {ties} after a tie, {different} different")

    def alone(self, name: str | None, prompts: list[Any], written: list[tuple[int, ...]]) -> list[list[int]]:
        """The token that the adapter alone puts at each place, given what was written before it.

        By induction these are the tokens of its own greedy decoding up to the first that differs, in one pass instead of one per
        token."""
        import torch

        from ..adapters import routing
        from ..serving.generate import encode_prompt
        from ..serving.prefill import padded, positions_of

        starts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        ids, mask = padded([[*start, *own[:-1]] for start, own in zip(starts, written)], 0, next(self.model.parameters()).device)
        with torch.no_grad(), routing(self.model, [name] * len(prompts)):
            chosen = self.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits.argmax(-1).tolist()
        return [row[-len(own):] for row, own in zip(chosen, written)]

    # -- the end --------------------------------------------------------------------------------------------------------
    def table(self) -> list[dict[str, Any]]:
        return [{"task": o.task.name, "method": o.task.method, "parameters": o.parameters, "file bytes": o.file_bytes,
                 "planned MiB": round(o.planned / 2**20, 1), "measured MiB": round(o.measured / 2**20, 1), "seconds": round(o.seconds, 1),
                 "zero-shot %": o.zero_shot, "4-shot %": o.four_shot, "after %": o.after,
                 "perplexity before": round(o.perplexity[0], 2), "after": round(o.perplexity[1], 3)} for o in self.outcomes.values()]

    def finish(self) -> None:
        rows = self.table()
        atomic_write_text(self.folder / "results.json", json.dumps(
            {"table": rows, "stages": self.stages, "failures": self.failures, "seconds": time.monotonic() - self.start}, indent=1))
        print(_plain_table(rows))
        for title, seconds in self.stages:
            print(f"{seconds:7.1f} s  {title}")
        print(f"{time.monotonic() - self.start:7.1f} s  in all")
        report = self.report(rows)
        print(f"recipes, runs and adapters: {self.folder}" + (f"\nreport: {report}" if report else ""))
        for failure in self.failures:
            print(f"FAILED: {failure}")

    def report(self, rows: list[dict[str, Any]]) -> Path | None:
        try:
            from ..report import drawings, write_page
            from ..report.runs import read_runs
            from ..report.tables import table

            runs = read_runs([self.folder / "runs" / name for name in self.outcomes])
            losses = drawings.curves("loss", "Training loss", {run.name: run.series("loss") for run in runs}, "step", "loss (nats)")
            memory = drawings.memory_bars("memory", "Planned bytes at the peak of a step, and the measured peak",
                                          {o.task.name: o.plan.categories for o in self.outcomes.values()},
                                          {o.task.name: o.measured for o in self.outcomes.values()})
            first = next(iter(self.outcomes.values()))
            samples = [{"task": o.task.name, **s} for o in self.outcomes.values() for s in o.samples[:4]]
            return write_page(self.folder / "report.html", "Graftwork demo: four methods on one NF4 base", [
                ("Results", table(rows)), ("Loss", losses.html()), ("Memory", memory.html() + drawings.memory_timeline(
                    "ledger", f"The planned ledger over two steps of '{first.task.name}'", first.plan.timeline).html()),
                ("Samples before and after", table(samples)),
                ("Stages", table([{"stage": t, "seconds": round(s, 1)} for t, s in self.stages]))])
        except ImportError as missing:
            self.say(f"no report.html: {missing.name} is not installed (pip install 'graftwork[report]')")
            return None


def _rss() -> int:
    from ..planning.measure import _status

    return _status("VmRSS") or 0


def _plain_table(rows: list[dict[str, Any]]) -> str:
    texts = [[f"{v:,}" if isinstance(v, int) else f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    head = list(rows[0])
    widths = [max(len(head[i]), *(len(t[i]) for t in texts)) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *texts]
    def aligned(line: list[str]) -> str:
        return "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))

    return "\n".join(map(aligned, lines))
