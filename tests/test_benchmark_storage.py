"""The storage benchmark: packed questions score as one row an option, the front, the dense copy."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from optimizer_tasks import characters, small_llama  # noqa: E402
from storage import front, perplexity, table  # noqa: E402
from storage_formats import configurations  # noqa: E402
from storage_tasks import likelihoods, packed  # noqa: E402

from graftwork.registry import make_config  # noqa: E402


@pytest.fixture(scope="module")
def base():
    tokenizer = characters()
    return small_llama(len(tokenizer), 0), tokenizer


ITEMS = [([("Question: abc\nAnswer:", " yes"), ("Question: abc\nAnswer:", " yesterday"), ("Question: abc\nAnswer:", " no")], 1),
         ([("Anna", " went home"), ("Bob", " went home")], 0),  # no common beginning
         *([([("x" * 150, " one" * 20), ("x" * 150, " two")], 0)] * 4)]  # more than one row


@pytest.mark.slow
@torch.no_grad()
def test_packed_questions_score_as_one_row_an_option(base):
    model, tokenizer = base
    found = likelihoods(model, tokenizer, ITEMS)
    assert len(packed(ITEMS, tokenizer)) > 1
    for (choices, _), scores in zip(ITEMS, found):
        for (before, rest), score in zip(choices, scores):
            ids = torch.tensor([tokenizer(before + rest, add_special_tokens=False)["input_ids"]])
            logits = model(input_ids=ids).logits[0, len(before) - 1:-1]
            assert score == pytest.approx(-float(F.cross_entropy(logits, ids[0, len(before):], reduction="sum")), rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_is_that_of_the_models_own_loss(base):
    windows = torch.randint(0, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    assert perplexity(base[0], windows) == pytest.approx(math.exp(float(base[0](input_ids=windows, labels=windows).loss)), rel=1e-5)


def test_front_and_table():
    entry = {"seconds": 1.0, "decode": {"bf16": 1.0, "fp32": 1.0}, "difference": 1e-5, "answers": None}
    found = {name: {**entry, "bits": bits, "perplexity": {"wikitext2": ppl, "c4": ppl}}
             for name, bits, ppl in (("dense", 32.0, 10.0), ("a", 4.0, 11.0), ("b", 4.5, 12.0), ("c", 3.0, 20.0))}
    assert front(found) == ["dense", "a", "c"]  # b: more bits than a, and worse
    text = table(found, [*found, "d"])
    assert "| **a** |" in text and "| b |" in text and "4 of 5 rows" in text and "Not run: d." in text


@pytest.mark.slow
def test_every_row_is_a_storage_that_exists():
    for section in configurations().values():
        options = dict(section)
        make_config("storage", options.pop("method"), **options)
