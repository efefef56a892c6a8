"""Batched generation: mixed adapters answer as each alone, as Transformers generates, and the verbs around it."""

import io
import json
import math
import sys

import pytest
import torch

import graftwork
import tiny
from graftwork.errors import DataError, UsageError
from graftwork.serving.cache import RoomyLayer
from graftwork.serving.generate import _choose, _Row, _Settings, encode_prompt, end_tokens, generate, stream
from graftwork.serving.loading import parse_adapters
from graftwork.serving.prefill import shared_prefixes

PROMPTS = ["hello there", "x", "the user and one more of these", [{"role": "user", "content": "hi"}], "a note", "th"]
NAMES = ["a", None, "b", "c", "b", "a"]


def stir(graft, scale=0.1):
    """Moves a fresh graft away from the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return graft


@pytest.fixture(scope="module")
def mixed():
    """Tiny Llama (fp32) with three grafts of different methods."""
    model = tiny.llama()
    stir(graftwork.attach(model, "lora", r=4, name="a"))
    stir(graftwork.attach(model, "paca", r=3, name="b", target_modules=["q_proj", "v_proj", "down_proj"]))
    stir(graftwork.attach(model, "flora", r=2, name="c", target_modules=["q_proj", "up_proj"]))
    return model, tiny.tokenizer()


def same_but_ties(got, wanted, margin=1e-4):
    """Whether two completions are equal up to a step whose top-2 gap is below the margin; and if there was such a step."""
    for step, (left, right) in enumerate(zip(got.ids, wanted.ids)):
        if left != right:
            assert wanted.gaps[step] < margin, (step, wanted.gaps[step])
            return False
    assert got.ids == wanted.ids and got.text == wanted.text
    return True


@pytest.mark.parametrize("build", tiny.CAUSAL)
def test_mixed_rows_equal_the_adapter_attached_alone(build):
    """Issue 2, item 8: greedy tokens of a mixed batch equal those of a model that carries that adapter only."""
    methods = {"a": dict(method="lora", r=4), "b": dict(method="paca", r=3)}
    model, tokenizer = tiny.CAUSAL[build](), tiny.tokenizer()
    for name, options in methods.items():
        stir(graftwork.attach(model, name=name, **options))
    names = [{"c": None}.get(n, n) for n in NAMES]
    batch = generate(model, tokenizer, PROMPTS, adapters=names, max_new_tokens=16, batch_size=4)
    ties = 0
    for name in (None, "a", "b"):
        alone = tiny.CAUSAL[build]()
        if name:
            stir(graftwork.attach(alone, name="x", **methods[name]))
        for i in [i for i, n in enumerate(names) if n == name]:
            ties += not same_but_ties(batch[i], generate(alone, tokenizer, [PROMPTS[i]], max_new_tokens=16, gaps=True)[0])
    assert ties <= 1
    assert len({c.ids for c in batch}) > 1


def test_agrees_with_transformers_generate(mixed):
    """The loop against model.generate, one row at a time, without padding."""
    model, tokenizer = mixed
    found = generate(model, tokenizer, PROMPTS, adapters=NAMES, max_new_tokens=24, gaps=True)
    ends = end_tokens(model, tokenizer)
    for prompt, name, completion in zip(PROMPTS, NAMES, found):
        ids = encode_prompt(tokenizer, prompt)
        with graftwork.routing(model, [name]):
            out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                                 max_new_tokens=24, eos_token_id=sorted(ends), pad_token_id=0)
        wanted = tuple(out[0, len(ids):].tolist())
        first = next((i for i, (l, r) in enumerate(zip(completion.ids, wanted)) if l != r), None)
        assert wanted == completion.ids or completion.gaps[first] < 1e-4
        assert completion.finish_reason == ("stop" if completion.ids[-1] in ends else "length")
        assert completion.tokens == len(completion.ids) == len(completion.gaps)


@pytest.mark.slow
@pytest.mark.parametrize("build", tiny.CAUSAL)
def test_common_prefixes_are_computed_once(build, monkeypatch):
    """Few-shot prompts of several adapters in one batch: the tokens of each prompt alone, through far fewer positions."""
    model, tokenizer = tiny.CAUSAL[build](), tiny.tokenizer()
    stir(graftwork.attach(model, "lora", r=4, name="a"))
    stir(graftwork.attach(model, "paca", r=3, name="b"))
    first, second = "one of these is the user and one is not " * 2, "hello hello there they were all of them "
    prompts = [shots + end for shots in (first, second) for end in ("a", "note", "to be", "x y z")] + ["h", "quite alone"]
    names = ["a"] * 4 + ["b", "b", None, None] + [None, "a"]
    alone = [generate(model, tokenizer, [p], adapters=[n], max_new_tokens=8, gaps=True)[0] for p, n in zip(prompts, names)]
    positions = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: positions.append(args[0].numel()))
    together = generate(model, tokenizer, prompts, adapters=names, max_new_tokens=8, batch_size=16, gaps=True)
    handle.remove()
    assert sum(same_but_ties(got, want) for got, want in zip(together, alone)) >= len(prompts) - 1
    longest = max(len(encode_prompt(tokenizer, p)) for p in prompts)
    assert sum(positions[:2]) < 0.75 * len(prompts) * longest and positions[2] <= len(prompts)


def test_prefixes_of_other_adapters_and_short_ones_are_not_shared():
    long = list(range(40))
    prompts = [long + [1], long + [2], long + [3, 4], long + [5]]
    assert shared_prefixes(prompts, ["a", "a", "b", "b"]) == [(0, 40), (0, 40), (2, 40), (2, 40)]
    assert shared_prefixes([[1, 2, 3], [4, 5, 6]], [None, None]) is None
    assert shared_prefixes([long], [None]) is None
    assert shared_prefixes([long, long, long], [None] * 3) == [(0, 39)] * 3
    far = [long + [1] * 3, long + [1] * 3, long[:18] + [9] * 25, long[:18] + [9] * 24 + [8]]
    assert shared_prefixes(far, [None] * 4) == [(0, 42), (0, 42), (3, 42), (3, 42)]


def test_rows_leave_the_batch(mixed):
    """A batch of very different lengths is compacted on the way, and nothing changes by it."""
    model, tokenizer = mixed
    free = generate(model, tokenizer, PROMPTS, adapters=NAMES, max_new_tokens=30)
    stop = [c.text[4 + i:7 + i] for i, c in enumerate(free[:4])]  # ends four rows at different steps
    seen = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[0]), with_kwargs=True)
    found = generate(model, tokenizer, PROMPTS, adapters=NAMES, max_new_tokens=30, batch_size=6, stop=stop)
    hook.remove()
    assert seen[0] == 6 and min(seen) < 6 and sorted(seen, reverse=True) == seen
    for prompt, name, completion in zip(PROMPTS, NAMES, found):
        alone = generate(model, tokenizer, [prompt], adapters=[name], max_new_tokens=30, stop=stop, gaps=True)[0]
        assert same_but_ties(completion, alone)
        assert not any(s in completion.text for s in stop)


def test_order_adapters_and_progress(mixed):
    model, tokenizer = mixed
    calls = []
    found = generate(model, tokenizer, PROMPTS, adapters=NAMES, max_new_tokens=5, batch_size=2,
                     progress=lambda *a: calls.append(a))
    assert calls[-1] == (6, 6) and [c[0] for c in calls] == sorted({c[0] for c in calls})
    for i in (0, 3, 5):
        assert generate(model, tokenizer, [PROMPTS[i]], adapters=[NAMES[i]], max_new_tokens=5)[0].ids == found[i].ids


def test_without_adapters_the_model_answers_as_it_stands():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    bare = generate(model, tokenizer, ["hello there"], max_new_tokens=8)[0]
    graft = stir(graftwork.attach(model, "lora", r=4, name="a"), 0.3)
    model.train()
    on, off = (generate(model, tokenizer, ["hello there"], max_new_tokens=8, **more)[0] for more in ({}, {"adapters": [None]}))
    assert off.ids == bare.ids != on.ids and model.training
    model.eval()
    graft.merge()
    assert generate(model, tokenizer, ["hello there"], max_new_tokens=8)[0].ids == on.ids


def test_sampling_depends_on_the_prompt_only(mixed):
    model, tokenizer = mixed
    options = dict(adapters=NAMES, max_new_tokens=12, temperature=1.0, top_p=0.9, top_k=50)
    one, many = (generate(model, tokenizer, PROMPTS, batch_size=b, seed=3, **options) for b in (1, 6))
    assert [c.ids for c in one] == [c.ids for c in many]
    assert [c.ids for c in generate(model, tokenizer, PROMPTS, seed=4, **options)] != [c.ids for c in one]
    state = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS[:2], adapters=["a", "b"], max_new_tokens=3, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_choice_follows_the_distribution():
    """Frequencies of 4000 draws against the closed form, with and without the cuts."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])

    def frequencies(**options):
        settings = _Settings(**{**dict(max_new_tokens=1, temperature=0.7, top_p=1.0, top_k=0, stop=(), gaps=False,
                                       ends=frozenset()), **options})
        row = _Row(0, [1], None, 1, torch.Generator().manual_seed(0))
        drawn = torch.tensor(_choose(logits.expand(4000, 5), [row] * 4000, settings))
        return torch.bincount(drawn, minlength=5) / 4000

    full = (logits[0].double() / 0.7).softmax(-1)
    torch.testing.assert_close(frequencies(), full.float(), atol=0.03, rtol=0)
    two = full[:2] / full[:2].sum()
    torch.testing.assert_close(frequencies(top_k=2)[:2], two.float(), atol=0.03, rtol=0)
    assert frequencies(top_k=2)[2:].sum() == 0
    nucleus = frequencies(top_p=float(full[0]) + 1e-6)
    assert nucleus[:2].min() > 0 and nucleus[2:].sum() == 0
    assert frequencies(top_p=1e-9)[0] == 1


def test_streamed_pieces_are_the_text(mixed):
    model, tokenizer = mixed
    for stop in ([], ["e"], ["th", "zz"]):
        pieces = list(stream(model, tokenizer, PROMPTS[0], adapter="b", max_new_tokens=20, stop=stop))
        whole = generate(model, tokenizer, [PROMPTS[0]], adapters=["b"], max_new_tokens=20, stop=stop)[0]
        assert "".join(pieces) == whole.text
    assert len(list(stream(model, tokenizer, PROMPTS[0], adapter="b", max_new_tokens=20))) > 1


def test_end_tokens_include_the_template_s_turn_end(mixed):
    model, tokenizer = mixed
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    other = tiny.tokenizer()
    other.chat_template = tiny.CHATML.replace("<|im_end|>", "<|im_start|>")
    assert end_tokens(model, other) == {1, 2}


def test_prompts_in_three_forms(mixed):
    _, tokenizer = mixed
    messages = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompt(tokenizer, messages) == encode_prompt(tokenizer, text) == tokenizer(text)["input_ids"]
    assert encode_prompt(tokenizer, [5, 6]) == [5, 6]


@pytest.mark.parametrize("options, error, words", [
    (dict(prompts=["a"], max_new_tokens=0), UsageError, "max_new_tokens"),
    (dict(prompts=["a"], temperature=-1.0), UsageError, "temperature"),
    (dict(prompts=["a"], top_p=0.0), UsageError, "top_p"),
    (dict(prompts=["a"], temperature=math.nan), UsageError, "temperature"),
    (dict(prompts=["a"], stop=[""]), UsageError, "stop"),
    (dict(prompts=["a", "b"], adapters=["a"]), UsageError, "1 adapters"),
    (dict(prompts=["a"], adapters=["aa"]), UsageError, "did you mean 'a'"),
    (dict(prompts=["a", ""]), DataError, "prompt 2"),
    (dict(prompts=[[]]), DataError, "empty"),
    (dict(prompts=["x" * 300]), DataError, "context 256"),
    (dict(prompts=[[{"role": "usr", "content": "x"}]]), DataError, "user"),
])
def test_bad_requests(mixed, options, error, words):
    with pytest.raises(error, match=words):
        generate(*mixed, **{"max_new_tokens": 2, **options})


def test_context_ends_a_row(mixed):
    prompt = "x" * 250
    found = generate(*mixed, [prompt, "a"], max_new_tokens=20, adapters=[None, None])
    assert found[0].tokens <= 6 and found[0].finish_reason in ("length", "stop") and found[1].tokens > 6


def test_cache_layer_equals_concatenation():
    layer, parts = RoomyLayer(4), []
    generator = torch.Generator().manual_seed(0)
    for length in (3, 1, 1, 4):  # the third update needs more than the reserved room
        parts.append(torch.randn(2, 2, length, 3, generator=generator))
        keys, values = layer.update(parts[-1], -parts[-1])
        assert torch.equal(keys, torch.cat(parts, 2)) and torch.equal(values, -keys)
        assert layer.get_seq_length() == keys.shape[2]
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.update(parts[1][1:], parts[1][1:])[0][:, :, :9], torch.cat(parts, 2)[1:])
    unfilled = RoomyLayer(64)
    first = unfilled.update(parts[0], parts[0])[0].data_ptr()
    assert all(unfilled.update(parts[1], parts[1])[0].data_ptr() == first for _ in range(5))  # no copy while there is room


# -- the verbs ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder and two artifacts on disk."""
    root = tmp_path_factory.mktemp("verbs")
    tiny.save(tiny.llama(), root / "model")
    model, _ = graftwork.load(root / "model")
    for name, method in (("a", "lora"), ("b", "paca")):
        graft = stir(graftwork.attach(model, method, r=4, name=name))
        graft.save(root / name)
        graft.detach()
    return root


def verb(capsys, *arguments, code=None):
    """A verb in this process; what it printed."""
    from graftwork.cli.main import main

    if code is None:
        main(list(map(str, arguments)))
    else:
        with pytest.raises(SystemExit) as leave:
            main(list(map(str, arguments)))
        assert leave.value.code == code
    return capsys.readouterr()


ROWS = [{"prompt": "hello there", "adapter": "a", "id": 7}, {"messages": [{"role": "user", "content": "hi"}], "adapter": None},
        {"prompt": "hello there", "adapter": "b"}, {"prompt": "hello there"}, {"prompt": "hello there", "adapter": "base"}]


def test_generate_verb(saved, tmp_path, capsys):
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--model", saved / "model", "--adapter", f"a={saved / 'a'}", "--adapter", f"b={saved / 'b'}"]
    verb(capsys, "generate", *options, "--max-new-tokens", 12, "--input", source, "--output", target)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("completion", "finish_reason", "tokens")} for row in found] == ROWS
    model, tokenizer = graftwork.load(saved / "model")
    for name in ("a", "b"):
        graftwork.attach_saved(model, saved / name, name=name)
    wanted = generate(model, tokenizer, [r.get("prompt", r.get("messages")) for r in ROWS],
                      adapters=["a", None, "b", None, None], max_new_tokens=12)
    written = [(r["completion"], r["finish_reason"], r["tokens"]) for r in found]
    assert written == [(c.text, c.finish_reason, c.tokens) for c in wanted]
    assert found[0]["completion"] != found[2]["completion"] != found[3]["completion"] == found[4]["completion"]


@pytest.fixture
def piped(monkeypatch):
    """piped(text): what the next verb reads from stdin."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def test_generate_verb_through_pipes(saved, capsys, piped):
    piped('{"prompt": "x", "adapter": "a"}\n')
    done = verb(capsys, "generate", "--model", saved / "model", "--adapter", f"a={saved / 'a'}", "--input", "-", "--output", "-",
                "--quiet", "--max-new-tokens", 3)
    assert done.err == "" and set(json.loads(done.out)) == {"prompt", "adapter", "completion", "finish_reason", "tokens"}


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "x"', "malformed JSON"), ('{"prompt": ""}', "empty"), ('{"adapter": "a"}', "either 'prompt' or 'messages'"),
    ('{"prompt": "x", "adapter": "aa"}', "did you mean 'a'"), ('{"messages": "x"}', "list of messages"),
    ('{"prompt": "%s"}' % ("x" * 300), "context 256"), ('{"prompt": "x", "adapter": 3}', "no adapter is named 3"),
    ('{"messages": [{"role": "usr", "content": "x"}]}', "unknown role"),
])
def test_broken_rows_name_their_line_and_leave_no_output(saved, tmp_path, capsys, line, words):
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n")
    target.write_text("old\n")
    text = verb(capsys, "generate", "--model", saved / "model", "--adapter", f"a={saved / 'a'}", "--input", source,
                "--output", target, code=1).err
    assert f"{source}:2" in text and words in text and "Traceback" not in text
    assert target.read_text() == "old\n" and sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_adapter_options(saved, tmp_path):
    assert parse_adapters([f"a={saved / 'a'}"]) == {"a": saved / "a"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "graft").symlink_to(saved / "a")
    assert parse_adapters([f"x={tmp_path / 'run'}"]) == {"x": tmp_path / "run" / "graft"}
    for options, words in [(["a"], "NAME=FOLDER"), (["a="], "NAME=FOLDER"), ([f"a b={saved / 'a'}"], "no name"),
                           ([f"base={saved / 'a'}"], "bare base"), ([f"a={saved / 'a'}"] * 2, "twice"),
                           ([f"a={saved / 'model'}"], "no saved graft"), ([f"a={saved / 'modle'}"], "did you mean"),
                           ([f"a={saved}"], "holds 2 grafts")]:
        with pytest.raises(UsageError, match=words):
            parse_adapters(options)


def test_chat_verb_on_piped_lines(saved, capsys, piped):
    lines = "hello\n/use b\nhello\n/use nosuch\n/sytem x\n/reset\n/use base\nhello\n/system be the user\nhello\n/quit\nhello\n"
    piped(lines)
    done = verb(capsys, "chat", "--model", saved / "model", "--adapter", f"a={saved / 'a'}", "--adapter", f"b={saved / 'b'}",
                "--max-new-tokens", 8)
    model, tokenizer = graftwork.load(saved / "model")
    for name in ("a", "b"):
        graftwork.attach_saved(model, saved / name, name=name)

    def turn(*texts, system=None):
        roles = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
        return [{"role": "system", "content": system}, *roles] if system else roles

    def text(messages, name):
        return generate(model, tokenizer, [messages], adapters=[name], max_new_tokens=8)[0].text

    first = text(turn("hello"), "a")
    wanted = [first, text(turn("hello", first, "hello"), "b"), text(turn("hello"), None),
              text(turn("hello", system="be the user"), None)]
    assert done.out == "".join(t + "\n" for t in wanted)
    for words in ("adapters: a, b, base", "no adapter is named 'nosuch'", "did you mean '/system'"):
        assert words in done.err
