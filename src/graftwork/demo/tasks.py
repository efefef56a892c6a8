"""The four tasks of `graft demo`: real data, made on the spot, nothing downloaded.

Every text comes from Unicode CLDR through the PyPI package `babel` (`pip install "graftwork[demo]"`); CLDR is under the Unicode
License, whose text babel carries and `licence()` returns. A task draws an *item* (a day, an amount, a measured value),
writes it in one of several languages, and asks for one canonical form. A hash of the item decides whether it belongs
to the training or to the evaluation side, so the two share no input, in no language, for any seed and any number of rows.

Each task's recipe (method, options, learning rate, steps) stands next to its data, because one fits the other.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from graftwork.errors import GraftworkError, UsageError

#: one item in EVAL_SHARE belongs to the evaluation side
EVAL_SHARE = 5
#: so many draws in a row without a new prompt mean that there are no more
PATIENCE = 1000
SOURCE = "Unicode CLDR, through the PyPI package babel (Unicode License)"


@dataclass(frozen=True)
class Example:
    """One prompt, its one right answer, and the items (one or several) that both were written from."""

    prompt: str
    answer: str
    items: tuple[str, ...]


#: draw(rng, keep): one random example, made only of items that `keep` accepts
Draw = Callable[[random.Random, Callable[[str], bool]], Example]


@dataclass(frozen=True)
class Task:
    """One task and the recipe that learns it.

    name, title, kind: identifier, heading, sort of task. instruction: what an untrained model is told, complete enough to answer
    by; the adapted model is not told, it has learned the task. same(prediction, answer): whether the two say the same.
    method, options, learning_rate, steps, batch_size, max_length, max_new_tokens: the adapter and its run; lengths in tokens of
    SmolLM2's tokenizer.
    """

    name: str
    title: str
    kind: str
    instruction: str
    draw: Draw
    method: str
    options: dict[str, Any]
    learning_rate: float
    steps: int
    max_length: int
    max_new_tokens: int
    batch_size: int = 8
    same: Callable[[str, str], bool] = str.__eq__
    source: str = SOURCE

    def train(self, n: int, seed: int = 0) -> list[Example]:
        """n different training examples, equal for equal (n, seed). Raises UsageError where the task has fewer."""
        return self._take("train", n, seed)

    def eval(self, n: int, seed: int = 0) -> list[Example]:
        """n different evaluation examples; none of their items occurs in any training set."""
        return self._take("eval", n, seed)

    def few_shot(self, k: int = 4) -> list[Example]:
        """k fixed training examples with k different answers, to show an untrained model what is wanted."""
        shown: dict[str, Example] = {}
        stream = self._stream("train", "few-shot")
        while len(shown) < k:
            example = next(stream)
            shown.setdefault(example.answer, example)
        return list(shown.values())

    def score(self, prediction: str, answer: str) -> bool:
        """Exact match of the first line that is not blank (an untrained model chats on after its answer), outer blanks aside."""
        lines = [line.strip() for line in prediction.splitlines() if line.strip()]
        return bool(lines) and self.same(lines[0], answer)

    def question(self, example: Example) -> str:
        """What the adapted model reads, as raw text: the prompt as the user's turn of its chat template.

        The turns matter: with the bare prompt and a line break in their place, 20 steps of LoRA learned the form of the answers but
        not to copy the digits. They are written out because the template adds a system message of 22 tokens to chats without one.
        """
        return f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"

    def baseline(self, example: Example, shots: int = 0) -> list[dict[str, str]]:
        """What the untrained model is asked, as a chat: the instruction, `shots` solved examples as earlier turns, the question.

        All before the last turn is the same for every example, so its keys and values can be computed once. Without shots the
        instruction stands in the user's turn, beside the question: a small model follows it better there.
        """
        if not shots:
            return [{"role": "user", "content": f"{self.instruction}\n\n{example.prompt}"}]
        chat = [{"role": "system", "content": self.instruction}]
        for shown in self.few_shot(shots):
            chat += [{"role": "user", "content": shown.prompt}, {"role": "assistant", "content": shown.answer}]
        return [*chat, {"role": "user", "content": example.prompt}]

    def rows(self, side: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
        """Lines of a prompt/completion data file; side is `train` or `eval`."""
        return [{"prompt": self.question(each), "completion": each.answer} for each in self._take(side, n, seed)]

    def side(self, item: str) -> str:
        """`train` or `eval`, from nothing but the task's name and the item."""
        digest = hashlib.sha256(f"{self.name}/{item}".encode()).digest()
        return "eval" if int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0 else "train"

    def _stream(self, side: str, seed: int | str) -> Iterator[Example]:
        if side not in ("train", "eval"):
            raise UsageError(f"there is no side '{side}'", remedy="sides: train, eval")
        rng = random.Random(f"{self.name}/{side}/{seed}")
        while True:
            yield self.draw(rng, lambda item: self.side(item) == side)

    def _take(self, side: str, n: int, seed: int) -> list[Example]:
        taken: dict[str, Example] = {}
        stream, misses = self._stream(side, seed), 0
        while len(taken) < n:
            example = next(stream)
            misses = misses + 1 if example.prompt in taken else 0
            taken.setdefault(example.prompt, example)
            if misses == PATIENCE:
                raise UsageError(f"task '{self.name}' has no {n} different {side} examples (found {len(taken)})",
                                 remedy=f"ask for at most {len(taken)}")
        return list(taken.values())


def task(name: str) -> Task:
    """The task of that name. Raises UsageError with the list."""
    for each in TASKS:
        if each.name == name:
            return each
    raise UsageError(f"there is no demo task '{name}'", remedy=f"tasks: {', '.join(t.name for t in TASKS)}")


def licence() -> str:
    """The Unicode License as babel ships it: what the texts of every task are under."""
    return (Path(_babel("core").__file__).parent / "locale-data" / "LICENSE.unicode").read_text(encoding="utf-8")


def _babel(module: str) -> Any:
    try:
        return importlib.import_module(f"babel.{module}")
    except ModuleNotFoundError:
        raise GraftworkError("the demo's texts come from the package babel, which is not installed",
                             remedy='pip install "graftwork[demo]"') from None


def _plain(text: str) -> str:
    """No-break and narrow spaces become blanks, as in typed text (and three tokens fewer each)."""
    return text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2019", "'")


def _until(rng: random.Random, keep: Callable[[str], bool], item: Callable[[], str]) -> str:
    """The first kept one of random items; four of five are training items, one of five is an evaluation item."""
    while not keep(found := item()):
        pass
    return found


# -- dates: a long written date -> ISO 8601 ------------------------------------------------------------------------------------

DATE_LANGUAGES = ("en_GB", "de", "fr", "es", "it", "pt")
MORE_DATE_LANGUAGES = ("en_US", "da", "nb", "nl", "sv")
FIRST_DAY, LAST_DAY = date(1950, 1, 1), date(2049, 12, 31)





def _draw_date(rng: random.Random, keep: Callable[[str], bool]) -> Example:
    return _dated(rng, keep, DATE_LANGUAGES)


def _draw_more_dates(rng: random.Random, keep: Callable[[str], bool]) -> Example:
    return _dated(rng, keep, MORE_DATE_LANGUAGES)


def _dated(rng: random.Random, keep: Callable[[str], bool], languages: tuple[str, ...]) -> Example:
    days = (LAST_DAY - FIRST_DAY).days + 1
    item = _until(rng, keep, lambda: (FIRST_DAY + timedelta(days=rng.randrange(days))).isoformat())
    text = _babel("dates").format_date(date.fromisoformat(item), "long", locale=rng.choice(languages))
    return Example(_plain(text), item, (item,))


# -- money: an amount with the currency's written name -> ISO 4217 code and a plain number -------------------------------------

#: (locale, currency): each currency as its own country writes it
CURRENCIES = (("en_US", "USD"), ("en_GB", "GBP"), ("de_DE", "EUR"), ("fr_FR", "EUR"), ("es_ES", "EUR"), ("de_CH", "CHF"),
              ("pt_BR", "BRL"), ("sv_SE", "SEK"), ("da_DK", "DKK"), ("nb_NO", "NOK"), ("pl_PL", "PLN"), ("tr_TR", "TRY"))


def _draw_money(rng: random.Random, keep: Callable[[str], bool]) -> Example:
    item = _until(rng, keep, lambda: str(Decimal(rng.randrange(10 ** rng.randint(3, 6), 10 ** 7)) / 100))
    locale, currency = rng.choice(CURRENCIES)
    amount = Decimal(item).quantize(Decimal("0.01"))
    text = _babel("numbers").format_currency(amount, currency, locale=locale, format_type="name")
    return Example(_plain(text), f"{currency} {amount}", (item,))


# -- measures: a measured value in words -> JSON -------------------------------------------------------------------------------

MEASURE_LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pt", "sv")
#: CLDR's unit (the quantity, then the unit) -> the symbol asked for
UNITS = {"length-meter": "m", "length-kilometer": "km", "mass-gram": "g", "mass-kilogram": "kg", "volume-liter": "l",
         "duration-hour": "h", "duration-minute": "min", "temperature-celsius": "°C", "speed-kilometer-per-hour": "km/h",
         "area-square-meter": "m²", "power-watt": "W", "digital-megabyte": "MB"}


def _draw_measure(rng: random.Random, keep: Callable[[str], bool]) -> Example:
    unit, language = rng.choice(tuple(UNITS)), rng.choice(MEASURE_LANGUAGES)
    item = _until(rng, keep, lambda: f"{rng.randrange(11, 1000) / 10:g} {unit}")
    value = float(item.split()[0])
    text = _babel("units").format_unit(value, unit, length="long", locale=language)
    answer = json.dumps({"quantity": unit.split("-")[0], "unit": UNITS[unit], "value": int(value) if value.is_integer() else value},
                        ensure_ascii=False, separators=(",", ":"))
    return Example(_plain(text), answer, (item,))


def _same_json(prediction: str, answer: str) -> bool:
    """Equal as JSON values: spacing and the order of keys are free."""
    try:
        return json.loads(prediction) == json.loads(answer)
    except ValueError:
        return False


TASKS: tuple[Task, ...] = (
    Task(
        name="dates", title="long dates in 6 languages -> ISO 8601", kind="normalization",
        instruction="Convert the date to ISO 8601 format, YYYY-MM-DD. Answer with the date only.",
        draw=_draw_date, method="flora", options={"r": 1, "target_modules": "all-linear"},
        learning_rate=1e-2, steps=20, batch_size=6, max_length=64, max_new_tokens=12,
    ),
    Task(
        name="money", title="amounts in 10 languages -> ISO 4217 code and number", kind="normalization",
        instruction="Convert the amount to its three-letter ISO 4217 currency code, a space, and the number with a decimal "
                    "point, two decimals and no thousands separator. Answer with that only.",
        draw=_draw_money, method="paca", options={"r": 16, "target_modules": "all-linear"},
        learning_rate=5e-3, steps=16, batch_size=5, max_length=64, max_new_tokens=14,
    ),
    Task(
        name="measures", title="measured values in 8 languages -> JSON", kind="structured extraction",
        instruction="Extract the quantity, the unit and the value from the text. Answer with one JSON object with the keys "
                    "\"quantity\" (one of " + ", ".join(dict.fromkeys(u.split("-")[0] for u in UNITS)) + "), \"unit\" (one of "
                    + ", ".join(UNITS.values()) + ") and \"value\" (a number with a decimal point), and nothing else.",
        draw=_draw_measure, same=_same_json, method="lora",
        options={"r": 8, "target_modules": "all-linear"},
        learning_rate=5e-3, steps=20, batch_size=6, max_length=64, max_new_tokens=22,
    ),
    Task(
        name="more_dates", title="long dates in 5 Germanic languages -> ISO 8601", kind="normalization",
        instruction="Convert the date to ISO 8601 format, YYYY-MM-DD. Answer with the date only.",
        draw=_draw_more_dates, method="nola",
        options={"r": 8, "n_basis": 64, "target_modules": "all-linear", "share_basis": True, "cache_basis": True},
        learning_rate=3e-2, steps=16, max_length=64, max_new_tokens=12,
    ),
)
