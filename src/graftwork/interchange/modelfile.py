"""The Modelfile that goes with a GGUF file: base, adapter, chat template in Go's template language, stop strings.

The chat template of a tokenizer is a program; what a Modelfile needs are its pieces: the text before and after a system,
user and assistant message, the text that opens an answer, and a default system message. They are read off from a few
renderings with marker texts, and used only if a longer conversation put together from them equals its rendering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARK = {"system": "SYSTEMTEXT", "user": "USERTEXT", "assistant": "ANSWERTEXT"}


@dataclass(frozen=True)
class ChatFormat:
    """What a conversation is made of: {role: (before, after)}, the opening of an answer, the default system message."""

    around: dict[str, tuple[str, str]]
    opening: str
    system: str | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a conversation, up to the opening of the next answer."""
        parts = [self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages]
        return "".join(parts) + self.opening

    def go_template(self) -> str:
        """The same as a Go template over .Messages."""
        branches = []
        for role, (before, after) in self.around.items():
            word = "if" if not branches else "else if"
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}')
        return "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + _literal(self.opening)


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The pieces of a tokenizer's chat template; None where there is none or where it is not made of such pieces."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    start = tokenizer.bos_token or ""

    def render(*roles: str, opening: bool = False) -> str:
        messages = [{"role": role, "content": MARK[role]} for role in roles]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)

    def cut(text: str, marker: str) -> tuple[str, str]:
        before, found, after = text.partition(marker)
        if not found:
            raise ValueError(marker)
        return before, after

    try:
        alone = render("system")
        asked = render("system", "user").removeprefix(alone)
        opening = render("system", "user", opening=True).removeprefix(alone + asked)
        answered = render("system", "user", "assistant").removeprefix(alone + asked)
        around = {"system": cut(alone, MARK["system"]), "user": cut(asked, MARK["user"]),
                  "assistant": cut(answered, MARK["assistant"])}
        plain = render("user")
    except Exception:  # templates raise what they like: jinja errors, or a KeyError for a role that they do not know
        return None
    before, after = around["system"]
    doubled = bool(start) and before.startswith(start) and not asked.startswith(start) and plain.startswith(start) and \
        plain.removeprefix(start) == asked
    if doubled:  # the beginning of the text, which llama.cpp adds itself
        around["system"] = (before.removeprefix(start), after)
        plain = plain.removeprefix(start)
    default = plain.removesuffix(asked) if plain.endswith(asked) else None
    system = None
    if default:
        if not (default.startswith(before) and default.endswith(after) and len(default) > len(before) + len(after)):
            return None
        system = default[len(before):len(default) - len(after)]
    found = ChatFormat(around, opening, system)
    longer = ["system", "user", "assistant", "user"]
    whole = render(*longer, opening=True)
    whole = whole.removeprefix(start) if doubled else whole
    messages = [{"role": role, "content": MARK[role]} for role in longer]
    return found if default is not None and found.render(messages) == whole else None


def stop_strings(model: Any, tokenizer: Any) -> list[str]:
    """The texts that end an answer: end tokens of the generation config and the tokenizer, and what the template puts after
    an answer if that is a special token."""
    if tokenizer is None:
        return []
    ids: list[int] = []
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids += [] if value is None else value if isinstance(value, list) else [value]
    stops = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    pieces = chat_format(tokenizer)
    if pieces is not None:
        after = pieces.around["assistant"][1].lstrip()
        stops += [t for t in sorted(tokenizer.all_special_tokens, key=len, reverse=True) if after.startswith(t)][:1]
    return list(dict.fromkeys(s for s in stops if s))


def modelfile(base: str, model: Any, tokenizer: Any, *, adapter: str | None = None) -> str:
    """The text of a Modelfile. base: what FROM names; adapter: file name of the adapter GGUF."""
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    pieces = chat_format(tokenizer)
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
        if pieces.system is not None:
            lines.append(f'SYSTEM """{pieces.system}"""')
    elif tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines.append("# the model's own chat template is in the GGUF file; it could not be written in Go's template language")
    lines += [f'PARAMETER stop "{stop}"' for stop in stop_strings(model, tokenizer)]
    return "\n".join(lines) + "\n"
