"""The demo's data: disjoint by item, reproducible, right by an independent reading of the texts."""

import json
import re
import sys
from dataclasses import replace
from datetime import date

import pytest

babel = pytest.importorskip("babel", reason="the demo's texts come from the extra [demo]")

from graftwork.demo import tasks as demo  # noqa: E402
from graftwork.demo.tasks import TASKS, task  # noqa: E402
from graftwork.errors import GraftworkError, UsageError  # noqa: E402

each_task = pytest.mark.parametrize("each", TASKS, ids=lambda t: t.name)


def test_four_tasks_four_methods_two_kinds():
    assert len({t.name for t in TASKS}) == 4
    assert {t.method for t in TASKS} == {"lora", "paca", "flora", "nola"}
    assert {"normalization", "structured extraction"} <= {t.kind for t in TASKS}


@each_task
def test_sides_share_neither_items_nor_prompts(each):
    train = each.train(600, seed=0) + each.train(200, seed=1) + each.few_shot(4)
    held_out = each.eval(60, seed=0) + each.eval(60, seed=5)
    assert not {i for e in train for i in e.items} & {i for e in held_out for i in e.items}
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert all(each.side(i) == "train" for e in train for i in e.items)
    assert all(each.side(i) == "eval" for e in held_out for i in e.items)


@each_task
def test_a_fifth_of_the_items_is_held_out(each):
    sides = [each.side(str(n)) for n in range(4000)]
    assert 0.17 < sides.count("eval") / len(sides) < 0.23


@each_task
def test_same_seed_same_rows_other_seed_other_rows(each):
    assert each.rows("train", 50, seed=3) == each.rows("train", 50, seed=3)
    assert each.train(50, seed=3) == each.train(80, seed=3)[:50]
    assert each.train(50, seed=3) != each.train(50, seed=4)
    assert len({e.prompt for e in each.train(200)}) == 200


@each_task
def test_enough_for_the_recipe_and_short_enough(each):
    rows = each.train(each.steps * each.batch_size)
    assert len(rows) == each.steps * each.batch_size
    assert max(len(e.prompt) for e in rows) <= 80
    assert not any(blank in e.prompt for e in rows for blank in "\u00a0\u202f\u2019")


@each_task
def test_score_is_exact(each):
    first, second = each.few_shot(2)
    assert first.answer != second.answer
    assert each.score(f"  {first.answer}\n", first.answer)
    assert each.score(f"\n{first.answer}\nAnything else?", first.answer)
    assert not each.score(second.answer, first.answer)
    assert not each.score(f"The answer is {first.answer}", first.answer)
    assert not each.score("", first.answer) and not each.score(" \n ", first.answer)


@each_task
def test_what_is_trained_and_what_is_asked(each):
    example = each.eval(1)[0]
    row = each.rows("eval", 1)[0]
    assert row == {"prompt": each.question(example), "completion": example.answer}
    chat = [("user", example.prompt), ("assistant", "")]
    assert row["prompt"] == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat)[:-len("<|im_end|>\n")]
    assert example.answer not in example.prompt


@each_task
def test_the_baseline_is_told_what_to_do(each):
    first, second = each.eval(2)
    for shots in (0, 4):
        chat = each.baseline(first, shots)
        assert each.instruction in chat[0]["content"] and first.prompt in chat[-1]["content"]
        assert [m["role"] for m in chat].count("assistant") == shots == len({m["content"] for m in chat[2::2]})
        assert chat[:-1] == each.baseline(second, shots)[:-1]
        assert all(first.answer != m["content"] for m in chat)


MONTHS = {  # first letters of each month in the eight languages, written down here, not read from CLDR
    1: "jan gen ene", 2: "feb fév fev", 3: "mar mär maa", 4: "apr avr abr", 5: "may mai mag mei maj", 6: "jun jui giu",
    7: "jul jui lug", 8: "aug aoû ago", 9: "sep set", 10: "oct okt ott out", 11: "nov", 12: "dec dez déc dic"}


def test_dates_read_back():
    for example in task("dates").train(400):
        day = date.fromisoformat(example.answer)
        numbers = [int(n) for n in re.findall(r"\d+", example.prompt)]
        assert numbers == [day.day, day.year]
        words = [w.lower()[:3] for w in re.findall(r"[^\W\d]+", example.prompt)]
        assert set(words) & set(MONTHS[day.month].split()), example


def test_money_reads_back():
    for example in task("money").train(400):
        code, number = example.answer.split()
        assert re.fullmatch(r"[A-Z]{3}", code) and re.fullmatch(r"\d+\.\d\d", number)
        assert re.sub(r"\D", "", example.prompt) == number.replace(".", "")
    seen = {e.prompt.lstrip("0123456789.,' "): e.answer[:3] for e in task("money").train(400)}
    assert seen["Schweizer Franken"] == "CHF" and seen["svenska kronor"] == "SEK" and seen["US dollars"] == "USD"


def test_measures_read_back():
    same = task("measures").same
    for example in task("measures").train(400):
        answer = json.loads(example.answer)
        assert set(answer) == {"quantity", "unit", "value"}
        assert float(re.match(r"[\d.,]+", example.prompt)[0].replace(",", ".")) == answer["value"]
        assert answer["unit"] in demo.UNITS.values()
    assert same('{"value":1.5,  "unit":"m"}', '{"unit": "m", "value": 1.5}')
    assert not same('{"unit": "m", "value": "1.5"}', '{"unit": "m", "value": 1.5}') and not same("m 1.5", '{"unit": "m"}')


def test_more_dates_read_back():
    rows = task("more_dates").train(400)
    for example in rows:
        day = date.fromisoformat(example.answer)
        assert [int(n) for n in re.findall(r"\d+", example.prompt)] == [day.day, day.year]
    dutch = {"januari": 1, "februari": 2, "maart": 3, "april": 4, "mei": 5, "juni": 6, "juli": 7, "augustus": 8, "september": 9,
             "oktober": 10, "november": 11, "december": 12, "marts": 3, "mars": 3, "maj": 5, "mai": 5, "augusti": 8}
    found = {word: int(e.answer[5:7]) for e in rows for word in e.prompt.lower().split() if word in dutch}
    assert len(found) > 10 and all(dutch[word] == month for word, month in found.items())


def test_licence_is_the_unicode_license():
    assert "UNICODE" in demo.licence().upper() and "Permission is hereby granted" in demo.licence()


def test_wrong_requests():
    with pytest.raises(UsageError, match="no demo task 'date'"):
        task("date")
    with pytest.raises(UsageError, match="no side 'test'"):
        task("dates").rows("test", 1)
    three_prompts = replace(task("dates"), draw=lambda rng, keep: demo.Example(str(rng.randrange(3)), "a", ("i",)))
    assert len(three_prompts.eval(3)) == 3
    with pytest.raises(UsageError, match=r"no 4 different eval examples \(found 3\)"):
        three_prompts.eval(4)


def test_without_babel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel.dates", None)
    with pytest.raises(GraftworkError) as caught:
        task("dates").train(1)
    assert "pip install" in caught.value.remedy
