"""Tokenized sets: truncation, digest, packing equal to separate rows, collation against brute force, batch order, config."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BertTokenizer, BloomConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from data_support import chat, make_tokenizer, trained_text, write_jsonl
from graftwork.data import (
    BatchOrder,
    ClassificationCollator,
    Collator,
    DataConfig,
    Example,
    assert_packable,
    build,
    build_splits,
    first_fit_decreasing,
    from_examples,
    hold_out,
    model_inputs,
    pad_token_of,
    real_tokens,
)
from graftwork.errors import DataError, IncompatibleError, UsageError

TOKENIZER = make_tokenizer()
SHAPE = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
EXAMPLES = [Example(prompt="p" * (1 + i % 4), completion="abcdefghijkl"[: 1 + i * 5 % 11]) for i in range(13)]


def tiny(config, **options):
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    torch.set_rng_state(state)
    return model


# ------------------------------------------------------------------------------------------------ the set

def test_rows_labels_and_statistics(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "cdefgh"}])
    dataset = build(TOKENIZER, path, max_length=5)
    assert trained_text(TOKENIZER, dataset[0]) == "cd<|im_end|>" and trained_text(TOKENIZER, dataset[1]) == "cdef"
    assert dataset[0]["labels"][:2] == [-100, -100] and dataset[0]["labels"][2:] == dataset[0]["input_ids"][2:]
    s = dataset.statistics
    assert (s.examples, s.rows, s.tokens, s.trained_tokens, s.truncated, s.share_truncated, s.longest) == (2, 2, 10, 7, 1, 0.5, 8)
    assert s.notes == ["1 of 2 examples are cut at max_length 5 (the longest has 8 tokens)"]
    assert dataset.sources(1) == [f"{path}:2"] and dataset.lengths() == [5, 5]
    assert [r["index"] for r in dataset[0:2]] == [0, 1] and dataset[-1] == dataset[1]
    with pytest.raises(IndexError):
        dataset[2]
    assert json.loads(json.dumps(s.to_json()))["share_truncated"] == 0.5


def test_rows_cut_before_their_answer_are_dropped_or_an_error():
    rows = [Example(prompt="p" * 9, completion="x"), Example(prompt="p", completion="x")]
    dataset = from_examples(TOKENIZER, rows, max_length=9)
    assert len(dataset) == 1 and dataset.statistics.dropped == 1 and "left out" in " ".join(dataset.statistics.notes)
    with pytest.raises(DataError, match="1 dropped") as caught:
        from_examples(TOKENIZER, rows[:1], max_length=9)
    assert "max_length" in caught.value.remedy


def test_first_token_is_never_a_target():
    dataset = from_examples(TOKENIZER, [Example(text="abc")])
    assert dataset[0]["labels"][0] == -100 and dataset.statistics.trained_tokens == 3
    assert Collator(0)([dataset[0]])["n_targets"] == 3


def test_bad_conversation_is_located_and_skippable(tmp_path):
    good = {"messages": chat("q", "a")}
    path = write_jsonl(tmp_path / "a.jsonl", [good, {"messages": [{"role": "assistant", "content": "first"}]}, good])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the conversation begins with the assistant"):
        build(TOKENIZER, path)
    dataset = build(TOKENIZER, path, skip_bad=True)
    assert len(dataset) == 2 and dataset.statistics.skipped == 1 and ":2:" in dataset.statistics.reasons[0]


def test_digest_sees_every_difference_and_nothing_else():
    base = from_examples(TOKENIZER, EXAMPLES)
    assert base.digest == from_examples(TOKENIZER, EXAMPLES).digest and len(base.digest) == 64
    other = [from_examples(TOKENIZER, EXAMPLES[::-1]), from_examples(TOKENIZER, EXAMPLES[:-1]),
             from_examples(TOKENIZER, EXAMPLES, train_on="all"), from_examples(TOKENIZER, EXAMPLES, packing=True),
             from_examples(TOKENIZER, EXAMPLES, packing=True, max_length=40),
             from_examples(TOKENIZER, [Example(**{**e.__dict__, "adapter": "a"}) for e in EXAMPLES])]
    assert len({base.digest, *(d.digest for d in other)}) == 7


# ------------------------------------------------------------------------------------------------ packing

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=40))
def test_first_fit_decreasing_equals_the_naive_algorithm(lengths):
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        home = next((b for b in bins if sum(lengths[k] for k in b) + lengths[i] <= 12), None)
        bins.append([i]) if home is None else home.append(i)
    assert first_fit_decreasing(lengths, 12) == sorted(sorted(b) for b in bins)


def test_packed_rows_hold_each_example_once_and_never_mix_adapters():
    examples = [Example(**{**e.__dict__, "adapter": "ab"[i % 2]}) for i, e in enumerate(EXAMPLES)]
    packed, plain = (from_examples(TOKENIZER, examples, max_length=32, packing=p) for p in (True, False))
    assert len(packed) < len(plain) and packed.statistics.examples == len(plain) and max(packed.lengths()) <= 32
    pieces = Counter()
    for row in packed:
        cuts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
        for a, b in zip(cuts, cuts[1:]):
            pieces[row["adapter"], tuple(row["input_ids"][a:b]), tuple(row["labels"][a:b])] += 1
    assert pieces == Counter((r["adapter"], tuple(r["input_ids"]), tuple(r["labels"])) for r in plain)
    batch = packed.collator()(packed[:])
    assert set(batch["rows"]) == {"a", "b"} and batch["n_targets"] == plain.statistics.trained_tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [
    LlamaConfig(**SHAPE), Qwen3Config(head_dim=8, **SHAPE), MistralConfig(sliding_window=4, **SHAPE),
    GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1),
], ids=["llama", "qwen3", "mistral-window", "gpt2"])
@torch.no_grad()
def test_packed_equals_separate(config, attention):
    model = tiny(config, attn_implementation=attention)
    packed = from_examples(TOKENIZER, EXAMPLES, max_length=40, packing=True)
    batch = Collator(pad_token_of(TOKENIZER), pad_to_multiple_of=16)(packed[:])
    logits = model(**model_inputs(batch)).logits
    for n in range(len(packed)):
        for segment in range(1, int(batch["segment_ids"][n].max()) + 1):
            here = batch["segment_ids"][n] == segment
            alone = model(input_ids=batch["input_ids"][n, here][None], use_cache=False).logits[0]
            assert torch.allclose(logits[n, here], alone, atol=1e-5, rtol=0)
    # the collator's targets give the loss of the separate rows
    lse = torch.log_softmax(logits.flatten(0, 1)[batch["target_index"]].double(), -1)
    loss = -lse.gather(1, batch["target_ids"][:, None]).sum()
    apart = from_examples(TOKENIZER, EXAMPLES, max_length=40)
    expected = sum(model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss.double()
                   * sum(label != -100 for label in r["labels"]) for r in apart)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert_packable(model)


def test_model_that_ignores_positions_cannot_be_packed():
    with pytest.raises(IncompatibleError, match="does not keep packed examples apart") as caught:
        assert_packable(tiny(BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4)))
    assert "packing: false" in caught.value.remedy


def test_packed_batch_carries_no_attention_mask_and_forbids_the_cache():
    packed = from_examples(TOKENIZER, EXAMPLES, packing=True)
    batch = packed.collator()(packed[:])
    assert "attention_mask" not in batch and model_inputs(batch)["use_cache"] is False
    plain = from_examples(TOKENIZER, EXAMPLES)
    assert set(model_inputs(plain.collator()(plain[:]))) == {"input_ids", "attention_mask"}


# ------------------------------------------------------------------------------------------------ collation

ROW = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ROW, min_size=1, max_size=3), min_size=1, max_size=4), st.booleans(), st.sampled_from([None, 4, 16]),
       st.sampled_from(["left", "right"]))
def test_collation_against_brute_force(parts, packed, multiple, side):
    rows, expected = [], []
    for examples in parts:
        examples = examples if packed else examples[:1]
        flat = [pair for e in examples for pair in e]
        rows.append({"input_ids": [t for t, _ in flat], "labels": [t if on else -100 for t, on in flat]})
        if packed:
            rows[-1]["position_ids"] = [p for e in examples for p in range(len(e))]
    batch = Collator(99, pad_to_multiple_of=multiple, padding_side=side).collate(rows)
    n, width = batch["input_ids"].shape
    longest = max(len(r["input_ids"]) for r in rows)
    assert width % (multiple or 1) == 0 and longest <= width < longest + (multiple or 1)
    for i, examples in enumerate(parts):
        t = width - len(rows[i]["input_ids"]) if side == "left" else 0
        for e in examples if packed else examples[:1]:
            expected += [(i * width + t + k - 1, e[k][0]) for k in range(1, len(e)) if e[k][1]]
            t += len(e)
    assert list(zip(batch["target_index"].tolist(), batch["target_ids"].tolist())) == expected
    assert batch["row_tokens"].sum() == batch["n_targets"] == len(expected)
    assert batch["row_tokens"].tolist() == batch["row_counts"] == [sum(p // width == i for p, _ in expected) for i in range(n)]
    for i, row in enumerate(rows):
        real = real_tokens(batch)[i]
        assert batch["input_ids"][i, real].tolist() == row["input_ids"] and batch["labels"][i, real].tolist() == row["labels"]
        assert (batch["input_ids"][i, ~real] == 99).all() and (batch["labels"][i, ~real] == -100).all()
        if "position_ids" in batch:
            assert batch["position_ids"][i, real].tolist() == row.get("position_ids", list(range(len(row["input_ids"]))))
    assert batch["n_tokens"] == sum(len(r["input_ids"]) for r in rows)
    assert all(v.dtype == torch.int64 for v in batch.values() if torch.is_tensor(v))


@torch.no_grad()
def test_left_padding_leaves_the_logits_alone():
    model, dataset = tiny(LlamaConfig(**SHAPE)), from_examples(TOKENIZER, EXAMPLES[:4])
    left, right = (model(**model_inputs(b)).logits.flatten(0, 1)[b["target_index"]]
                   for b in (dataset.collator(padding_side=s)(dataset[:]) for s in ("left", "right")))
    assert torch.allclose(left, right, atol=1e-5)
    with pytest.raises(UsageError):
        Collator(0, padding_side="center")


def test_adapter_names_pass_through():
    dataset = from_examples(TOKENIZER, [Example(text="abc", adapter="a"), Example(text="abc")])
    batch = dataset.collator()(dataset[:])
    assert batch["rows"] == ("a", None) and batch["index"] == (0, 1)
    assert "rows" not in dataset.collator()([dataset[1]])


# ------------------------------------------------------------------------------------------------ classification

@pytest.fixture(scope="module")
def bert():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very"]
    return BertTokenizer(vocab={w: i for i, w in enumerate(words)})


def test_classification_pairs(tmp_path, bert):
    rows = [{"sentence": "good film", "sentence2": "very", "label": "yes"},
            {"sentence": "bad", "sentence2": "bad very", "label": "no"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = build(bert, path)
    batch = dataset.collator(pad_to_multiple_of=8)(dataset[:])
    assert isinstance(dataset.collator(), ClassificationCollator) and dataset.label_names == ("no", "yes")
    reference = bert([r["sentence"] for r in rows], [r["sentence2"] for r in rows], padding="max_length", max_length=8,
                     return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], reference[name])
    assert batch["labels"].tolist() == [1, 0] and batch["n_targets"] == 2 and batch["n_tokens"] == 12
    short = build(bert, path, max_length=5)
    assert short.lengths() == [5, 5] and short.statistics.truncated == 2 and short.statistics.longest == 6
    with pytest.raises(UsageError, match="packing"):
        build(bert, path, packing=True)
    assert short.digest != dataset.digest
    single = write_jsonl(tmp_path / "b.jsonl", [{"text": "good", "label": "noo"}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: label 'noo'.*did you mean 'no'"):
        build(bert, single, label_names=dataset.label_names)


def test_numeric_labels_keep_their_numbers(tmp_path, bert):
    (tmp_path / "a.csv").write_text("text,label\ngood,2\nbad,0\n")
    dataset = build(bert, tmp_path / "a.csv")
    assert dataset.label_names == ("0", "1", "2") and [r["labels"] for r in dataset] == [2, 0]
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "good", "label": 10}, {"text": "bad", "label": 2}])
    assert [r["labels"] for r in build(bert, path)] == [10, 2]


def test_classification_and_text_do_not_mix(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="mixed"):
        build(TOKENIZER, f"{tmp_path}/*.jsonl")


# ------------------------------------------------------------------------------------------------ order

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_row_once_an_epoch_and_any_step_without_replay(n, batch_size, seed):
    replay = [batch for epoch in range(3) for batch in BatchOrder(n, batch_size, seed, epoch)]
    for epoch in range(3):
        assert sorted(i for batch in BatchOrder(n, batch_size, seed, epoch) for i in batch) == list(range(n))
    for step in range(len(replay)):
        order, place = BatchOrder.at_step(n, batch_size, seed, step)
        assert order[place] == replay[step]


def test_order_depends_on_seed_and_epoch_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    orders = {tuple(BatchOrder(50, 50, seed, epoch)[0]) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and torch.equal(state, torch.get_rng_state())
    assert list(BatchOrder(5, 2, 0, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert list(BatchOrder(5, 2, 0, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]
    assert BatchOrder.at_step(5, 2, 0, 2, drop_last=True)[0].epoch == 1
    for n, size, options in ((0, 1, {}), (3, 0, {}), (1, 2, {"drop_last": True})):
        with pytest.raises(UsageError):
            BatchOrder(n, size, 0, **options)


# ------------------------------------------------------------------------------------------------ config

def splits(path, seed=0, **options):
    return build_splits(DataConfig(train=path, **options), TOKENIZER, seed=seed)


@pytest.fixture
def twenty(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "other": f"o{i}"} for i in range(20)]
    return write_jsonl(tmp_path / "train.jsonl", rows)


@pytest.mark.parametrize("options", [{"train_on": "all"}, {"max_length": 3}, {"packing": True}, {"chat": True}, {"limit": 3},
                                     {"columns": {"completion": "other"}}, {"eval_fraction": 0.2}, {"system": "s", "chat": True}])
def test_each_option_changes_the_data(twenty, options):
    less = {k: v for k, v in options.items() if k != next(iter(options))}
    assert splits(twenty, **options)[0].digest != splits(twenty, **less)[0].digest


def test_format_skip_bad_and_eval_of_the_config(tmp_path, twenty):
    both = write_jsonl(tmp_path / "both.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    assert splits(both)[0].digest != splits(both, format="text")[0].digest
    (tmp_path / "bad.jsonl").write_text('{"text": "t"}\n{\n')
    bad = str(tmp_path / "bad.jsonl")
    with pytest.raises(DataError):
        splits(bad)
    assert splits(bad, skip_bad=True)[0].statistics.skipped == 1
    train, held = splits(twenty, eval=bad, skip_bad=True, packing=True)
    assert held.statistics.skipped == 1 and train.statistics.skipped == 0 and train.packed and not held.packed
    assert splits(twenty)[1] is None


def test_online_of_the_config(tmp_path, monkeypatch):
    import sys
    import types

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: [{"text": f"{name} {split}"}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        splits("org/set")
    assert "org/set train" in TOKENIZER.decode(splits("org/set", online=True)[0][0]["input_ids"])


def test_hold_out_is_seeded_disjoint_and_keeps_equal_rows_together():
    examples = [Example(text=f"t{i % 10}") for i in range(30)]
    train, held = hold_out(examples, 0.25, seed=1)
    assert len({e.text for e in held}) == 3 and len(held) == 9 and not {e.text for e in train} & {e.text for e in held}
    assert hold_out(examples, 0.25, seed=1) == (train, held)
    assert len({tuple(e.text for e in hold_out(examples, 0.25, seed=s)[1]) for s in range(6)}) > 1
    with pytest.raises(DataError, match="cannot be split"):
        hold_out(examples[:1], 0.5)


def test_label_of_a_held_out_row_may_be_missing_from_training(tmp_path, bert):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"good {i}", "label": f"l{i}"} for i in range(6)])
    train, held = build_splits(DataConfig(train=path, eval_fraction=0.5), bert)
    assert train.label_names == held.label_names == tuple(f"l{i}" for i in range(6))


@pytest.mark.parametrize(("options", "words"), [
    ({"format": "alpacca"}, "did you mean 'alpaca'"), ({"columns": {"promt": "x"}}, "did you mean 'prompt'"),
    ({"train": []}, "names no file"),
    ({"max_length": 1}, "greater than or equal to 2"), ({"eval": "e", "eval_fraction": 0.1}, "exclude each other"),
    ({"train_on": "x"}, "assistant"), ({"eval_fraction": 1.0}, "less than 1"), ({"pack": True}, "Extra inputs")])
def test_config_refuses(options, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig(**{"train": "a.jsonl", **options})
