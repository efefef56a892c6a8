"""Reads rows from JSONL, JSON, CSV, TSV and Parquet files (text forms also gzipped), globs, and the hub when asked.

Every reader yields `(Source, row)` where `row` is a dict, or the `DataError` of that one line, so that the caller
decides whether a bad line stops the run or is counted (`skip_bad`). Damage that leaves the rest of a file unreadable
(a cut gzip stream, an unclosed JSON array) is raised at once: skipping it would lose good rows without a word.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, nearest
from .example import Source

Rows = Iterator[tuple[Source, "dict[str, Any] | DataError"]]
_READERS: dict[str, Callable[[str, BinaryIO], Rows]] = {}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:\[(?P<config>[\w.-]+)\])?(?::(?P<split>[\w\[\]:%+]+))?")


def _reader(*suffixes: str):
    def decorate(function):
        _READERS.update({suffix: function for suffix in suffixes})
        return function

    return decorate


def _as_row(value: Any, suspicious: bool = False) -> dict[str, Any] | DataError:
    """`suspicious`: the text has escapes that may be half of a surrogate pair, which no tokenizer accepts."""
    try:
        if suspicious:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return DataError("a \\u escape is half of a surrogate pair, which is no character", remedy="remove it, or set skip_bad")
    if isinstance(value, dict):
        return value
    return DataError(f"the row is a JSON {type(value).__name__}, not an object",
                     remedy='each row must be an object such as {"prompt": "...", "completion": "..."}')


def _parse_line(raw: bytes) -> dict[str, Any] | DataError:
    try:
        return _as_row(json.loads(raw.decode("utf-8-sig")), _SURROGATE.search(raw) is not None)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start + 1} of the line", remedy="save the file as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(f"malformed JSON at column {error.colno}: {error.msg}",
                         remedy="each line must be one complete JSON object; skip_bad skips such lines and counts them")
    except RecursionError:
        return DataError("malformed JSON: nested too deeply", remedy="flatten the row")


@_reader(".jsonl", ".ndjson")
def _read_jsonl(name: str, stream: BinaryIO) -> Rows:
    blank: list[int] = []  # blank lines at the end of a file are no rows; between rows they are a mistake
    for number, raw in enumerate(stream, 1):
        if not raw.strip():
            blank.append(number)
            continue
        for empty in blank:
            yield Source(name, empty), DataError("empty line", remedy="delete it, or set skip_bad")
        blank.clear()
        yield Source(name, number), _parse_line(raw)


@_reader(".json")
def _read_json(name: str, stream: BinaryIO) -> Rows:
    content = stream.read()
    head = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] != b"[":
        yield from _read_jsonl(name, io.BytesIO(content))
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8", remedy="save the file as UTF-8") from None
    yield from _scan_array(name, text, _SURROGATE.search(content) is not None)


def _scan_array(name: str, text: str, suspicious: bool) -> Rows:
    """Items one by one, so that each has the number of the line it starts on."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    position, counted, line = space.match(text, text.index("[") + 1).end(), 0, 1
    while text[position:position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}",
                            remedy="mend the array there; what follows cannot be read") from None
        yield Source(name, line), _as_row(value, suspicious)
        position = space.match(text, position).end()
        if text[position:position + 1] == ",":
            position = space.match(text, position + 1).end()
        elif text[position:position + 1] != "]":
            at = line + text.count("\n", counted, position)
            raise DataError(f"{name}:{at}: malformed JSON: expected ',' or ']' after an item of the array",
                            remedy="mend the array there; the file may be cut off")


@_reader(".csv")
def _read_csv(name: str, stream: BinaryIO, delimiter: str = ",") -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))  # the default of 128 KiB is shorter than some documents
    table = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        for row in table:
            short = [key for key, value in row.items() if value is None]
            wrong = f"{len(row[None])} more" if None in row else f"{len(short)} fewer" if short else None
            bad = DataError(f"the row has {wrong} values than the header has columns",
                            remedy="quote values that contain the delimiter or a line break") if wrong else None
            yield Source(name, table.line_num), bad or dict(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}:{table.line_num + 1}: not readable as CSV: {error}",
                        remedy="save it as UTF-8 CSV with a header line and quoted text") from None


@_reader(".tsv")
def _read_tsv(name: str, stream: BinaryIO) -> Rows:
    return _read_csv(name, stream, delimiter="\t")


@_reader(".parquet")
def _read_parquet(name: str, stream: BinaryIO) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
            for row in batch.to_pylist():
                number += 1
                # Parquet has one schema for all rows: a missing value there is what a missing key is in JSON.
                yield Source(name, number, "row"), {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}", remedy="write the file again") from None


def find_files(path: str | os.PathLike | list | tuple) -> list[Path]:
    """The files of a path, a glob, or a list of them, sorted within each glob. No duplicates.

    Raises DataError when something matches nothing (with the nearest file name) or is a folder.
    """
    if isinstance(path, (list, tuple)):
        found = [file for each in path for file in find_files(each)]
    else:
        text = os.path.expanduser(os.fspath(path))
        found = [Path(text)] if os.path.isfile(text) else [Path(f) for f in sorted(glob.glob(text, recursive=True))]
        found = [file for file in found if file.is_file()]
        if not found:
            raise _nothing_found(text)
    return list(dict.fromkeys(found))


def _nothing_found(text: str) -> DataError:
    if os.path.isdir(text):
        return DataError(f"data path '{text}' is a folder", remedy=f"name a file or a glob: {text.rstrip('/')}/*.jsonl")
    folder = os.path.dirname(text) or "."
    known = [os.path.join(folder, n) if os.path.dirname(text) else n
             for n in (os.listdir(folder) if os.path.isdir(folder) else []) if _suffix(n)[0] in _READERS]
    hub = "; a data set of the hub needs online: true" if _is_hub_name(text) else ""
    return DataError(f"no data file '{text}'{nearest(text, known)}",
                     remedy=f"check the path; readable: {', '.join(_READERS)}, text forms also .gz{hub}")


def _is_hub_name(text: str) -> bool:
    return _HUB.fullmatch(text) is not None and _suffix(text)[0] not in _READERS  # a misspelt file is no hub name


def _suffix(name: str) -> tuple[str, bool]:
    path = Path(name.lower())
    zipped = path.suffix == ".gz"
    return (Path(path.stem).suffix if zipped else path.suffix), zipped


def read_file(path: str | os.PathLike) -> Rows:
    """Rows of one file, with their sources. Raises DataError for an empty, damaged or unknown kind of file."""
    name = os.fspath(path)
    suffix, zipped = _suffix(name)
    if suffix not in _READERS or (zipped and suffix == ".parquet"):
        raise DataError(f"{name}: cannot read files of kind '{suffix or 'none'}'{nearest(suffix, _READERS)}",
                        remedy=f"readable: {', '.join(_READERS)}, text forms also with .gz")
    empty = True
    try:
        with (gzip.open if zipped else open)(name, "rb") as stream:
            for row in _READERS[suffix](name, stream):
                empty = False
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}", remedy="check permissions, or copy the file again") from None
    if empty:
        raise DataError(f"{name}: the file holds no rows", remedy="put at least one row in it, or leave the file out")


def read_hub(reference: str) -> Rows:
    """Rows of a data set of the Hugging Face hub, `org/name[config]:split` (split: train). Needs the network or its cache."""
    import datasets

    parts = _HUB.fullmatch(reference)
    if parts is None:
        raise DataError(f"'{reference}' is no data file and no hub name", remedy="hub names look like org/name[config]:split")
    try:
        table = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(f"the hub did not give data set '{reference}': {error}",
                        remedy="check name and split, the network, HF_TOKEN and HF_HUB_OFFLINE, or use a local file") from None
    for number, row in enumerate(table, 1):
        yield Source(reference, number, "row"), {key: value for key, value in row.items() if value is not None}


def read_rows(path: str | os.PathLike | list | tuple, *, online: bool = False) -> Rows:
    """Rows of all files of a path, glob or list, in a fixed order. A name that is no file is looked up on the hub
    only with `online=True`. Raises DataError as `read_file` and `find_files` do.
    """
    for each in path if isinstance(path, (list, tuple)) else [path]:
        try:
            files = find_files(each)
        except DataError:
            if not (online and _is_hub_name(os.fspath(each))):
                raise
            yield from read_hub(os.fspath(each))
            continue
        for file in files:
            yield from read_file(file)
