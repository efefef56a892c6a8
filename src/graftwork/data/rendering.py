"""From an `Example` to token ids and the mask of trained tokens.

Conversations go through the tokenizer's own chat template. What is trained (`train_on`):

    assistant        every turn of the assistant (the prompt/completion formats: the completion)
    last_assistant   the last turn of the assistant only
    completion       every turn of the assistant after the last user message (tool calls included, tool results not)
    all              every token

Where a row itself has a prompt and a completion, nothing of the prompt is trained, unless by `all`.

Turns are found by the template's `{% generation %}` tags where it has them. We take the character spans from the
renderer and map them through token offsets ourselves: `apply_chat_template(return_assistant_tokens_mask=True)` drops
every mask of a row when one span starts on a character that belongs to no token, and trains all that follows when one
ends on such a character. Without tags, turn i is what `messages[:i+1]` renders beyond `messages[:i]` plus the
generation prompt; both renderings must be prefixes of the whole conversation as *tokens*, else the model would be
trained on a prompt that it never sees in use, and the row is refused.

The token that ends a turn is trained with it, since that is how the model learns to stop; the white space that a
template prints behind it is not. If the last turn ends without a special token, the tokenizer's EOS is appended.
Raw prompt + completion is tokenized as one text if the prompt's tokens are a prefix of it, and as two texts (what
the model meets in use) if a token would straddle the boundary; EOS follows. A message with `weight: 0` is not trained.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..errors import DataError, UsageError, nearest
from .example import Example

TRAIN_ON = ("assistant", "last_assistant", "completion", "all")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """Token ids and, for each, whether the model learns to produce it. Not yet truncated."""

    input_ids: list[int]
    trained: list[bool]


class Renderer:
    """Renders and tokenizes examples; one per data set.

    chat: True renders prompt/completion rows as a user and an assistant message, False renders alpaca rows as raw text,
    None renders conversations (alpaca included, if there is a template) as chats and prompt/completion rows as raw text.
    system: put in front of conversations that do not begin with a system message of their own.
    """

    def __init__(self, tokenizer, *, train_on: str = "assistant", system: str | None = None, chat: bool | None = None):
        if train_on not in TRAIN_ON:
            raise UsageError(f"train_on: '{train_on}' is unknown{nearest(train_on, TRAIN_ON)}",
                             remedy=f"one of {', '.join(TRAIN_ON)}")
        self.tokenizer, self.train_on, self.system, self.chat = tokenizer, train_on, system, chat
        self.eos = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.bos = self._leading_special_ids()

    def _leading_special_ids(self) -> list[int]:
        plain, full = self.ids("a"), self.tokenizer("a", verbose=False)["input_ids"]
        at = next((k for k in range(len(full)) if full[k:k + len(plain)] == plain), 0)
        return full[:at]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    # ---------------------------------------------------------------- choice of form

    def encode(self, example: Example) -> Encoded:
        """Raises DataError if this row cannot be rendered or has nothing, or nothing but, trained tokens; UsageError if
        no row like it can be rendered with these options."""
        if example.text is not None:
            self._refuse_system("text")
            ids = self._ended(self.bos + self.ids(example.text))
            return Encoded(ids, [True] * len(ids))
        if self._as_chat(example):
            encoded, has_prompt = self._encode_chat(example), True
        else:
            self._refuse_system("prompt and completion")
            encoded, has_prompt = self._encode_raw(example), bool(example.prompt)
        if self.train_on == "all":
            return Encoded(encoded.input_ids, [True] * len(encoded.input_ids))
        if not any(encoded.trained):
            raise DataError(f"no token of the row is trained with train_on: {self.train_on}",
                            remedy="check the weights of its messages and the template's generation tags")
        if has_prompt and all(encoded.trained):
            raise DataError(f"every token of the row is trained with train_on: {self.train_on}, its prompt too",
                            remedy="mend the template's generation tags, or say train_on: all")
        return encoded

    def _as_chat(self, example: Example) -> bool:
        raw = example.completion is not None
        template = self.tokenizer.chat_template is not None
        wants = self.chat if self.chat is not None else (example.messages is not None and (template or not raw))
        if wants and not template:
            raise UsageError("the tokenizer has no chat template, so conversations cannot be rendered",
                             remedy="use an instruct model, or prompt/completion or alpaca rows with chat: false")
        if not wants and not raw:
            raise UsageError("chat: false, but the rows are conversations",
                             remedy="leave chat out, or use prompt/completion rows")
        return wants

    def _refuse_system(self, form: str) -> None:
        if self.system is not None:
            raise UsageError(f"system is set, but rows of {form} are not rendered as a chat",
                             remedy="remove system, or set chat: true for prompt/completion rows")

    # ---------------------------------------------------------------- raw text

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]

    def _encode_raw(self, example: Example) -> Encoded:
        prompt = self.bos + self.ids(example.prompt)
        whole = self.bos + self.ids(example.prompt + example.completion)
        if whole[:len(prompt)] != prompt:
            whole = prompt + self.ids(example.completion)
        whole = self._ended(whole)
        return Encoded(whole, [i >= len(prompt) for i in range(len(whole))])

    # ---------------------------------------------------------------- conversations

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        messages = list(example.messages or ({"role": "user", "content": example.prompt},
                                             {"role": "assistant", "content": example.completion}))
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _wanted(self, example: Example, messages: list[dict]) -> list[int]:
        """Indices of the messages to train, by train_on and the messages' weights."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        start = 0
        if example.completion_start is not None:
            start = example.completion_start + len(messages) - len(example.messages)
        elif self.train_on == "completion":
            start = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        turns = [i for i in turns if i >= start]
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        return [i for i in turns if messages[i].get("weight") != 0]

    def _render(self, messages: list[dict], tools, **options) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans of the template's generation tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = list(tools) if tools else None
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        template = self.tokenizer.get_chat_template(tools=tools)
        try:
            texts, spans = render_jinja_template([plain], tools=tools, chat_template=template,
                                                 **self.tokenizer.special_tokens_map, **options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise DataError(f"the chat template refuses the conversation: {error}",
                            remedy="check the order of roles and the fields that this model's template needs") from None
        return texts[0], list(spans[0]) if spans else []

    def _encode_chat(self, example: Example) -> Encoded:
        messages, tools = self._messages(example), example.tools
        template = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        self._refuse_losses(template, messages, tools)
        wanted = self._wanted(example, messages)
        tagged = _GENERATION_TAG.search(template) is not None
        ids, spans = (self._tagged if tagged else self._by_prefixes)(messages, tools, wanted)
        trained = [False] * len(ids)
        for start, stop in spans:
            trained[start:stop] = [True] * (stop - start)
        if trained and trained[-1] and ids[-1] not in self.special and self.eos is not None:
            ids, trained = [*ids, self.eos], [*trained, True]
        return Encoded(ids, trained)

    def _refuse_losses(self, template: str, messages: list[dict], tools) -> None:
        present = {"tool_calls": any("tool_calls" in m for m in messages), "tools": bool(tools)}
        for name, there in present.items():
            if there and not re.search(rf"\b{name}\b", template):
                raise DataError(f"the row has {name}, but this model's chat template never prints them",
                                remedy="use a model whose template knows tools, or write the calls into the content")

    def _by_prefixes(self, messages: list[dict], tools, wanted: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        text, _ = self._render(messages, tools)
        ids, spans = self.ids(text), []
        for i in wanted:
            start = self._prefix(text, ids, messages[:i], tools, i, generation=True)
            stop = len(ids) if i == len(messages) - 1 else self._prefix(text, ids, messages[:i + 1], tools, i, generation=False)
            spans.append((start, self._turn_end(ids, start, stop)))
        return ids, spans

    def _prefix(self, text: str, ids: list[int], messages: list[dict], tools, turn: int, *, generation: bool) -> int:
        """Number of tokens of the rendered prefix, after checking that it is one."""
        edge = "begins" if generation else "ends"
        if not messages:
            raise DataError("the conversation begins with the assistant, and this model's chat template has no generation tags",
                            remedy="begin with a user message, or set system")
        part, _ = self._render(messages, tools, add_generation_prompt=generation)
        if not text.startswith(part):
            raise DataError(f"the chat template renders message {turn + 1} differently alone and in the whole conversation,"
                            f" so where it {edge} is unknown",
                            remedy="use train_on: last_assistant or completion, or a template with {% generation %} tags")
        prefix = self.ids(part)
        if ids[:len(prefix)] != prefix:
            raise DataError(f"a token straddles the place where message {turn + 1} {edge}",
                            remedy="remove white space at the edges of the message, or use a template with {% generation %} tags")
        return len(prefix)

    def _turn_end(self, ids: list[int], start: int, stop: int) -> int:
        """Cuts the white space that the template prints behind the token that ends a turn."""
        last = next((k for k in range(stop - 1, start - 1, -1) if ids[k] in self.special), None)
        return stop if last is None or self.tokenizer.decode(ids[last + 1:stop]).strip() else last + 1

    def _tagged(self, messages: list[dict], tools, wanted: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        text, spans = self._render(messages, tools, return_assistant_tokens_mask=True)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, starts = out["input_ids"], [start for start, _ in out["offset_mapping"]]
        if len(wanted) < sum(m["role"] == "assistant" for m in messages):
            spans = [span for i in wanted for span in spans[self._spans_before(messages[:i], tools):
                                                            self._spans_before(messages[:i + 1], tools)]]
        found = []
        for begin, end in spans:
            inside = [k for k, start in enumerate(starts) if begin <= start < end]
            if inside:
                stop = inside[-1] + 1
                ended = ids[stop - 1] in self.special or stop == len(ids) or ids[stop] not in self.special
                found.append((inside[0], stop if ended else stop + 1))
        return ids, found

    def _spans_before(self, messages: list[dict], tools) -> int:
        return len(self._render(messages, tools, return_assistant_tokens_mask=True)[1]) if messages else 0

    def notes(self, example: Example) -> list[str]:
        """What the template leaves out of a row although it can be trained."""
        if example.messages is None or not self._as_chat(example):
            return []
        thoughts = any("reasoning_content" in m for m in example.messages)
        template = self.tokenizer.get_chat_template(tools=list(example.tools) if example.tools else None)
        return ["reasoning is in the data, but the chat template does not print reasoning_content: it is not trained"] \
            if thoughts and "reasoning_content" not in template else []
