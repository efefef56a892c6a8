"""Files, formats, bad rows: every error names file and line, every format gives the same Example from every file kind."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_support import write_jsonl
from graftwork.data import FORMATS, Format, Statistics, data_format, detect_format, find_files, load_dataset_rows, read_file
from graftwork.errors import DataError, UsageError

PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "naïve, \"x\"\nline", "completion": " 東京"}]


def as_jsonl(path, rows):
    return write_jsonl(path, rows)


def as_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


def as_array(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def as_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", as_jsonl), ("a.ndjson", as_jsonl), ("a.jsonl.gz", as_gz),
                                             ("a.json", as_array),
                                             ("a.csv", as_csv), ("a.tsv", as_csv), ("a.parquet", as_parquet)])
def test_every_file_kind_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name, PAIRS)
    examples = load_dataset_rows(tmp_path / name)
    assert [(e.prompt, e.completion) for e in examples] == [(p["prompt"], p["completion"]) for p in PAIRS]
    assert all(str(tmp_path / name) == e.source.file for e in examples)


VALUES = st.one_of(st.text(), st.none(), st.lists(st.text(max_size=3), max_size=2))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), min_size=1, max_size=4), st.sampled_from([None, 1, 4]))
def test_array_scanner_reads_what_json_wrote(tmp_path_factory, rows, indent):
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(rows, indent=indent))
    read = list(read_file(path))
    assert [row for _, row in read] == rows
    lines = path.read_text().split("\n")
    assert all(lines[source.number - 1].strip(" [,").startswith("{") for source, _ in read)


@pytest.mark.parametrize(("content", "line", "words"), [
    (b'{"text": "a"}\n{"text": "b"\n', 2, "malformed JSON"),
    (b'{"text": "a"}\n\n{"text": "b"}\n', 2, "empty line"),
    (b'{"text": "a"}\n[1]\n', 2, "not an object"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8"),
    (b'{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
    (b'{"text": "a"}\n{"text": "  "}\n', 2, "'text' is empty"),
    (b'{"text": "a"}\n{"text": 7}\n', 2, "must be text, it is int"),
    (b'{"text": "a"}\n{"texd": "x"}\n', 2, "'text' of format 'text' is missing (did you mean 'texd'?)"),
    (b'{"text": "a"}\n{"text": "a", "adapter": 3}\n', 2, "'adapter' must be a name"),
])
def test_bad_line_is_named_and_can_be_skipped(tmp_path, content, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset_rows(path)
    assert caught.value.message.startswith(f"{path}:{line}: ") and words in caught.value.message and caught.value.remedy
    statistics = Statistics()
    kept = load_dataset_rows(path, skip_bad=True, statistics=statistics)
    good = [x for n, x in enumerate(content.splitlines(), 1) if n != line]
    assert [e.text for e in kept] == [json.loads(x)["text"] for x in good]
    assert statistics.skipped == 1 and statistics.reasons == [caught.value.message]


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n')
    assert len(load_dataset_rows(tmp_path / "a.jsonl")) == 1


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.csv"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        load_dataset_rows(tmp_path / name, skip_bad=True)


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match="2 skipped") as caught:
        load_dataset_rows(tmp_path / "a.jsonl", skip_bad=True)
    assert f"{tmp_path / 'a.jsonl'}:1" in caught.value.message


@pytest.mark.parametrize(("name", "content", "where"), [
    ("a.json", b'[\n{"text": "a"},\n{"text": }\n]', ":3: malformed"), ("a.json", b'[\n{"text": "a"}\n', ":3: malformed"),
    ("a.csv", b'text\n"unclosed\n', "not readable as CSV"), ("a.parquet", b"PAR1no", "not a readable Parquet"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot be read"), ("a.xlsx", b"x", "files of kind '.xlsx'"),
])
def test_damage_that_hides_other_rows_is_never_skipped(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset_rows(tmp_path / name, skip_bad=True)
    assert where in caught.value.message and caught.value.remedy


def test_csv_row_of_another_width(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc\nd,e,f\n")
    statistics = Statistics()
    assert len(load_dataset_rows(tmp_path / "a.csv", skip_bad=True, statistics=statistics)) == 1
    assert [":3: the row has 1 fewer" in statistics.reasons[0], ":4: the row has 1 more" in statistics.reasons[1]] == [True, True]


def test_globs_lists_and_missing_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert [f.name for f in find_files(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [f.name for f in find_files([f"{tmp_path}/c.csv", f"{tmp_path}/*.*"])] == ["c.csv", "a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"did you mean '.*a\.jsonl'"):
        find_files(f"{tmp_path}/aa.jsonl")
    with pytest.raises(DataError, match="is a folder") as caught:
        find_files(tmp_path)
    assert "*.jsonl" in caught.value.remedy


def test_hub_names_only_with_online(tmp_path, monkeypatch):
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: asked.append((name, config, split)) or [{"text": "hub", "label": None}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no data file") as caught:
        load_dataset_rows("org/set")
    assert "online: true" in caught.value.remedy and not asked
    with pytest.raises(DataError, match="no data file"):  # a misspelt file never goes to the network
        load_dataset_rows("train.jsonl", online=True)
    assert load_dataset_rows("org/set[en]:test", online=True)[0].text == "hub"
    assert load_dataset_rows("org/set", online=True)[0].source.unit == "row"
    assert asked == [("org/set", "en", "test"), ("org/set", None, "train")]


# ------------------------------------------------------------------------------------------------ formats

ROWS = {
    "alpaca": {"instruction": "Add", "input": "1 1", "output": "2"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "completion": {"prompt": "a", "completion": "b"},
    "classification": {"text": "a", "label": 1},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", ROWS)
def test_auto_recognizes_each_format(name):
    assert detect_format({**ROWS[name], "id": 3}).name == name
    assert FORMATS[name].parse(ROWS[name])


def test_sharegpt_and_messages_agree():
    assert FORMATS["sharegpt"].parse(ROWS["sharegpt"]) == FORMATS["messages"].parse(ROWS["messages"])


def test_unrecognized_rows_get_the_nearest_field(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"promt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="'promt' .did you mean 'prompt'") as caught:
        load_dataset_rows(path)
    assert "columns" in caught.value.remedy
    assert load_dataset_rows(path, columns={"prompt": "promt"})[0].prompt == "a"


def test_columns_errors(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b", "prompt": "not this"}])
    example = load_dataset_rows(path, format="completion", columns={"prompt": "question", "completion": "answer"})[0]
    assert (example.prompt, example.completion) == ("a", "b")
    with pytest.raises(DataError, match="column 'anser' .for 'completion'. is missing .did you mean 'answer'"):
        load_dataset_rows(path, columns={"completion": "anser"})
    with pytest.raises(UsageError, match="'promt', which is no field.*did you mean 'prompt'"):
        load_dataset_rows(path, columns={"promt": "question"})
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        load_dataset_rows(path, format="alpacca")


@pytest.mark.parametrize(("name", "row", "words"), [
    ("alpaca", {"instruction": "a", "output": " "}, "'output' is empty"),
    ("completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
    ("messages", {"messages": []}, "at least one"),
    ("messages", {"messages": [{"role": "user", "content": "a"}]}, "no answer"),
    ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "empty answer"),
    ("messages", {"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
    ("messages", {"messages": [{"from": "user", "value": "a"}]}, "no 'role'"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
    ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "weight of message 1"),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "no function name"),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON"),
    ("messages", {**ROWS["messages"], "tools": ["f"]}, "must hold objects"),
    ("sharegpt", {"conversations": [{"role": "user", "content": "a"}]}, "lacks 'from'"),
    ("sharegpt", {"conversations": [{"from": "humans", "value": "a"}]}, "did you mean 'human'"),
    ("alpaca", {**ROWS["alpaca"], "history": [["q"]]}, "pairs"),
    ("classification", {"text": "a", "label": None}, "whole number or a name"),
    ("classification", {"text": "a", "label": -1}, "no label"),
    ("classification", {"txt": "a", "label": 1}, "did you mean 'txt'"),
])
def test_bad_rows_of_each_format(name, row, words):
    with pytest.raises(DataError) as caught:
        FORMATS[name].parse(row)
    assert words in caught.value.message and caught.value.remedy


def test_tool_calls_reasoning_and_nested_json_text():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "2"}, {"role": "assistant", "content": "two"}]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    example = FORMATS["messages"].parse(row)
    assert example.messages[0]["content"] == "ab"
    parsed = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert example.messages[1] == {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [parsed]}
    assert example.messages[2]["tool_call_id"] == "1"
    assert FORMATS["messages"].parse({k: json.dumps(v) for k, v in row.items()}) == example  # as CSV and Parquet hold it
    shared = {"conversations": [{"from": "human", "value": "ab"},
                                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                                {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"}], "system": "s"}
    roles = [m["role"] for m in FORMATS["sharegpt"].parse(shared).messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_alpaca_history_and_system():
    example = FORMATS["alpaca"].parse({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"})
    assert [m["content"] for m in example.messages] == ["s", "a", "b", "c", "d"]
    assert example.completion is None  # no raw form: it would lose the history
    assert FORMATS["alpaca"].parse(ROWS["alpaca"]).messages[0]["content"] == "Add\n\n1 1"


def test_a_format_is_one_class():
    @data_format
    class Pair(Format):
        name, required = "pair", ("left", "right")

        def parse(self, row):
            return FORMATS["completion"].parse({"prompt": self.text(row, "left"), "completion": self.text(row, "right")})

    try:
        assert detect_format({"left": "a", "right": "b"}).parse({"left": "a", "right": "b"}).prompt == "a"
    finally:
        del FORMATS["pair"]


def test_limit_and_adapter(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "adapter": "own"}, {"text": "c"}])
    assert [e.adapter for e in load_dataset_rows(path, adapter="file")] == ["file", "own", "file"]
    assert [e.text for e in load_dataset_rows(path, limit=2)] == ["a", "b"]
    seen = []
    load_dataset_rows(path, progress=lambda stage, done: seen.append((stage, done)))
    assert seen == [("reading", 1), ("reading", 2), ("reading", 3)]
