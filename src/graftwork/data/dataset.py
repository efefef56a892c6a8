"""The tokenized data set: built from files, a list of rows for the collator, with a digest and its statistics."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import DataError, UsageError, nearest
from .collate import ClassificationCollator, Collator, pad_token_of
from .config import DataConfig
from .example import Example, located
from .loading import Progress, Statistics, load_dataset_rows, nothing_usable
from .packing import first_fit_decreasing
from .rendering import Renderer


class TokenDataset(Sequence):
    """Rows for `Collator` or `ClassificationCollator` (`dataset.collator()` gives the right one).

    `dataset[i]` is {"input_ids": [int], "labels": [int] with -100 where untrained (not shifted), "index": i} and, where they
    apply, "position_ids" (packed rows), "adapter", "token_type_ids"; with classification "labels" is one int, with regression
    one float (`real`).
    Order and content are functions of files, tokenizer and options; `digest` is the sha256 of the content.
    """

    def __init__(self, rows: list[dict], groups: list[list[int]], *, tokenizer, statistics: Statistics, sources: list[str],
                 packed: bool = False, label_names: tuple[str, ...] | None = None, real: bool = False):
        self._rows, self._groups, self._sources, self.packed = rows, groups, sources, packed
        self.tokenizer, self.statistics, self.label_names, self.real = tokenizer, statistics, label_names, real
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        parts = [self._rows[k] for k in self._groups[i]]
        row = {name: [x for part in parts for x in part[name].tolist()] if np.ndim(parts[0][name]) else parts[0][name]
               for name in parts[0]}
        if self.packed:
            row["position_ids"] = [p for part in parts for p in range(len(part["input_ids"]))]
        return {**row, "index": i}

    def _digest(self) -> str:
        digest = hashlib.sha256(repr((self.packed, self.label_names)).encode())
        for group in self._groups:
            for part in (self._rows[k] for k in group):
                for name, value in part.items():
                    digest.update(f"{name}:{np.size(value)}:".encode())
                    kind = "<f8" if isinstance(value, float) else "<i4"
                    digest.update(value.encode() if isinstance(value, str) else np.asarray(value, kind).tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(len(self._rows[k]["input_ids"]) for k in group) for group in self._groups]

    def sources(self, i: int) -> list[str]:
        """`file:line` of the examples in row i."""
        return [self._sources[k] for k in self._groups[i]]

    def collator(self, **options) -> Collator | ClassificationCollator:
        cls = ClassificationCollator if self.real or self.label_names is not None else Collator
        return cls(pad_token_of(self.tokenizer), **options)


def describe_example(dataset: TokenDataset, i: int) -> list[tuple[str, bool]]:
    """(text of a token, whether it is trained) for each token of row i; the texts joined are the row's text.

    Where one character is spread over several tokens, the last of them carries it and the others are empty.
    """
    row, decode = dataset[i], dataset.tokenizer.decode
    labels = row["labels"] if isinstance(row["labels"], list) else [-100] * len(row["input_ids"])
    pieces, context, held = [], [], []
    for token, label in zip(row["input_ids"], labels):
        held.append(token)
        # Decoders print the space before a word only if something stands before it: hence the context.
        before = decode(context, clean_up_tokenization_spaces=False) if context else ""
        text = decode(context + held, clean_up_tokenization_spaces=False)[len(before):]
        incomplete = text.endswith("\ufffd") and len(held) < 4
        pieces.append(("" if incomplete else text, label != -100))
        if not incomplete:
            context, held = (context + held)[-4:], []
    return pieces


def _encode_rows(examples: Iterable[Example], renderer: Renderer, max_length: int, skip_bad: bool, statistics: Statistics,
                 progress: Progress | None) -> tuple[list[dict], list[str]]:
    rows, sources = [], []
    for n, example in enumerate(examples, 1):
        try:
            ids, trained = renderer.encode(example)
        except DataError as error:
            error = located(error, example.source) if example.source else error
            if not skip_bad:
                raise error from None
            statistics.skip(error)
            continue
        for note in renderer.notes(example):
            statistics.note(note)
        statistics.longest = max(statistics.longest, len(ids))
        statistics.truncated += len(ids) > max_length
        ids, trained = ids[:max_length], trained[:max_length]
        if not any(trained[1:]):
            statistics.drop(f"{example.source}: no trained token within the first {max_length}")
            continue
        trained[0] = False  # nothing stands before it to predict it from
        ids = np.asarray(ids, np.int32)
        row = {"input_ids": ids, "labels": np.where(trained, ids, -100).astype(np.int32)}
        rows.append(row if example.adapter is None else {**row, "adapter": example.adapter})
        sources.append(str(example.source))
        statistics.tokens += len(ids)
        statistics.trained_tokens += sum(trained)
        if progress:
            progress("tokenizing", n)
    return rows, sources


def _encode_labelled(examples: list[Example], tokenizer, names: tuple[str, ...] | None, max_length: int, skip_bad: bool,
                     statistics: Statistics) -> tuple[list[dict], list[str]]:
    """names: of the classes; None where the labels are real numbers."""
    rows, sources = [], []
    for example in examples:
        if names is not None and str(example.label) not in names:
            error = DataError(f"{example.source}: label {example.label!r} is not one of the training labels"
                              f"{nearest(str(example.label), names)}", remedy=f"labels: {', '.join(names)}")
            if not skip_bad:
                raise error
            statistics.skip(error)
            continue
        length = len(tokenizer(*example.texts, verbose=False)["input_ids"])
        out = tokenizer(*example.texts, truncation=True, max_length=max_length, verbose=False)
        row = {k: np.asarray(out[k], np.int32) for k in ("input_ids", "token_type_ids") if k in out}
        row["labels"] = example.label if names is None else names.index(str(example.label))
        rows.append(row if example.adapter is None else {**row, "adapter": example.adapter})
        sources.append(str(example.source))
        statistics.longest = max(statistics.longest, length)
        statistics.truncated += length > max_length
        statistics.tokens += len(row["input_ids"])
        statistics.trained_tokens += 1
    return rows, sources


_MOST_NUMBERED = 10_000  # larger numbers are identifiers, not class numbers


def _label_names(examples: list[Example]) -> tuple[str, ...]:
    """Whole numbers 0..max (also as text, as CSV has them) stand for themselves, names are sorted."""
    labels = {str(e.label) for e in examples}
    if all(label.isdecimal() and label.isascii() and int(label) < _MOST_NUMBERED for label in labels):
        return tuple(str(k) for k in range(max(map(int, labels)) + 1))
    return tuple(sorted(labels))


#: size of the numbers from which on squared errors drown the rest of a step
_LARGE_TARGET = 100.0


def _note_targets(labels: list[float], statistics: Statistics) -> None:
    """What there is to say of the real labels of a training set."""
    low, high = min(labels), max(labels)
    if low == high and len(labels) > 1:
        statistics.note(f"all {len(labels)} labels are {low:g}: there is nothing to tell the rows apart by")
    elif max(-low, high) > _LARGE_TARGET:
        statistics.note(f"the labels go from {low:g} to {high:g}, and the loss is their squared error: divided by a constant, so that "
                        "they are of the size of 1, they are learned in fewer steps")


def _pack(rows: list[dict], max_length: int) -> list[list[int]]:
    """Rows of different adapters are never packed together: routing is by row."""
    groups: dict[str | None, list[int]] = {}
    for k, row in enumerate(rows):
        groups.setdefault(row.get("adapter"), []).append(k)
    return [[members[i] for i in each] for members in groups.values()
            for each in first_fit_decreasing([len(rows[k]["input_ids"]) for k in members], max_length)]


def from_examples(tokenizer, examples: list[Example], *, train_on: str = "assistant", max_length: int = 1024,
                  packing: bool = False, system: str | None = None, chat: bool | None = None, skip_bad: bool = False,
                  label_names: Sequence[str] | None = None, statistics: Statistics | None = None,
                  progress: Progress | None = None) -> TokenDataset:
    """Tokenizes examples. `label_names`: those of the training set, for an evaluation set. See `build`."""
    statistics = statistics if statistics is not None else Statistics()
    labelled, real = examples[0].texts is not None, examples[0].is_real
    kind = "regression" if any(e.is_real for e in examples) else "classification"
    if any((e.texts is not None) != labelled for e in examples):
        raise DataError(f"{kind} rows are mixed with rows of other formats", remedy="use one file per task")
    odd = next((e for e in examples if e.is_real != real), None)
    if odd is not None:
        raise DataError(f"{odd.source}: the label {odd.label!r} is {'a class' if real else 'a real number'}, that of "
                        f"{examples[0].source} is {'a real number' if real else 'a class'}",
                        remedy="data.format: regression reads all labels as real numbers")
    if labelled and (packing or system is not None):
        raise UsageError(f"packing and system do not apply to {kind} rows", remedy="remove them from data")
    if labelled:
        names = None if real else tuple(label_names) if label_names is not None else _label_names(examples)
        rows, sources = _encode_labelled(examples, tokenizer, names, max_length, skip_bad, statistics)
    else:
        names = None
        renderer = Renderer(tokenizer, train_on=train_on, system=system, chat=chat)
        rows, sources = _encode_rows(examples, renderer, max_length, skip_bad, statistics, progress)
    if not rows:
        raise nothing_usable("the data", statistics)
    groups = _pack(rows, max_length) if packing else [[k] for k in range(len(rows))]
    statistics.examples, statistics.rows = len(rows), len(groups)
    if statistics.truncated:
        statistics.note(f"{statistics.truncated} of {len(rows) + statistics.dropped} examples are cut at max_length {max_length}"
                        f" (the longest has {statistics.longest} tokens)")
    if statistics.dropped:
        statistics.note(f"{statistics.dropped} examples are left out: their trained tokens all lie beyond max_length")
    if statistics.skipped:
        statistics.note(f"{statistics.skipped} unusable rows are skipped, the first: {statistics.reasons[0]}")
    return TokenDataset(rows, groups, tokenizer=tokenizer, statistics=statistics, sources=sources, packed=packing,
                        label_names=names, real=real)


def build(tokenizer, path: str | os.PathLike | list, *, format: str = "auto", train_on: str = "assistant",
          max_length: int = 1024, packing: bool = False, system: str | None = None, chat: bool | None = None,
          columns: dict[str, str] | None = None, skip_bad: bool = False, limit: int | None = None, online: bool = False,
          adapter: str | None = None, label_names: Sequence[str] | None = None, progress: Progress | None = None) -> TokenDataset:
    """Files to a tokenized data set; the options are those of `DataConfig`.

    Rows whose trained tokens all lie beyond max_length are dropped and counted. Raises DataError (a bad row, or none
    left), UsageError (options that do not fit the rows or each other).
    """
    statistics = Statistics()
    examples = load_dataset_rows(path, format=format, columns=columns, skip_bad=skip_bad, limit=limit, online=online,
                                 adapter=adapter, statistics=statistics, progress=progress)
    return from_examples(tokenizer, examples, train_on=train_on, max_length=max_length, packing=packing, system=system, chat=chat,
                         skip_bad=skip_bad, label_names=label_names, statistics=statistics, progress=progress)


def hold_out(examples: list[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(train, held out): ceil(fraction * distinct) of the distinct examples, those with the smallest seeded hash.

    Equal examples stay on one side, so nothing held out was trained on. Both sides keep the order of the files.
    """
    rank = {key: hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in {e.content_key() for e in examples}}
    held = set(sorted(rank, key=rank.__getitem__)[:math.ceil(fraction * len(rank))])
    if len(held) == len(rank):
        raise DataError(f"{len(rank)} distinct rows cannot be split with eval_fraction {fraction}",
                        remedy="add rows, name an eval file, or set eval_fraction: 0")
    return [e for e in examples if e.content_key() not in held], [e for e in examples if e.content_key() in held]


def build_splits(config: DataConfig, tokenizer, *, seed: int = 0, adapter: str | None = None,
                 progress: Progress | None = None) -> tuple[TokenDataset, TokenDataset | None]:
    """(train, eval or None) of a recipe's data section; `seed` chooses the held-out rows of `eval_fraction`.

    Skipped rows are counted with the training set when eval is held out of it. The evaluation set is never packed, so its
    loss does not depend on `packing`.
    """
    reading = config.model_dump(include={"format", "columns", "skip_bad", "limit", "online"})
    shaping = config.model_dump(include={"train_on", "max_length", "system", "chat", "skip_bad"})
    first, second = Statistics(), Statistics()
    names = None
    examples = load_dataset_rows(config.train, **reading, adapter=adapter, statistics=first, progress=progress)
    held: list[Example] = []
    if config.eval is not None:
        held = load_dataset_rows(config.eval, **reading, adapter=adapter, statistics=second, progress=progress)
    elif config.eval_fraction:
        names = _label_names(examples) if examples[0].texts is not None and not examples[0].is_real else None
        examples, held = hold_out(examples, config.eval_fraction, seed)
    train = from_examples(tokenizer, examples, **shaping, packing=config.packing, label_names=names, statistics=first,
                          progress=progress)
    if train.real:
        _note_targets([example.label for example in examples], first)
    if not held:
        return train, None
    return train, from_examples(tokenizer, held, **shaping, label_names=train.label_names, statistics=second, progress=progress)
