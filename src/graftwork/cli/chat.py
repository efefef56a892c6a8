"""`graft chat`: talk to a base and its grafts."""

from __future__ import annotations

import typer

EPILOG = "Example: graft chat --model smollm2-135m-instruct --adapter pirate=runs/pirate"
HELP = "/use NAME (or base) | /reset | /system TEXT | /help | /quit"


def run(
    model: str = typer.Option(..., "--model", help="Packaged name, folder, .gguf file or Hub id."),
    adapter: list[str] = typer.Option([], "--adapter", help="NAME=FOLDER of a saved graft; repeatable, the first one answers."),
    storage: str = typer.Option(None, "--storage", help="dense, nf4, ... (default: as the adapters were trained)."),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp32 (default: the checkpoint's)."),
    system: str = typer.Option(None, "--system", help="System message."),
    max_new_tokens: int = typer.Option(512, "--max-new-tokens", help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", help="0 is greedy."),
    top_p: float = typer.Option(1.0, "--top-p", help="Sample from the smallest set of this probability."),
    top_k: int = typer.Option(0, "--top-k", help="Sample from so many tokens; 0: all."),
    seed: int = typer.Option(0, "--seed", help="Seed of the sampling."),
    quiet: bool = typer.Option(False, "--quiet", help="Answers only."),
) -> None:
    """Chat with a model and switch its adapters; also works on piped lines (answers on stdout, notes on stderr)."""
    import sys

    from ..serving.loading import load_with_adapters, parse_adapters

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    folders = parse_adapters(adapter)
    base, tokenizer = load_with_adapters(model, folders, storage=storage, dtype=dtype, say=say)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    chat = Chat(base, tokenizer, list(folders), system, options, say)
    say(f"{HELP}\nadapters: {', '.join([*folders, 'base'])}; answering: {chat.adapter or 'base'}")
    for line in _lines(chat):
        if not chat.command(line):
            break


def _lines(chat: Chat):
    """Lines of the user, with a prompt on a terminal."""
    import sys

    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    while True:
        try:
            yield input(f"{chat.adapter or 'base'}> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


class Chat:
    """The conversation so far and who answers. `command(line)` is False when the chat is over."""

    def __init__(self, model, tokenizer, adapters: list[str], system: str | None, options: dict, say):
        self.model, self.tokenizer, self.adapters, self.options, self.say = model, tokenizer, adapters, options, say
        self.adapter = adapters[0] if adapters else None
        self.system, self.messages = system, []
        if tokenizer.chat_template is None:
            say("note: the tokenizer has no chat template: every line is continued as plain text, without memory")

    def command(self, line: str) -> bool:
        """Does what a line says: a command after `/`, else a message to answer."""
        from ..errors import GraftworkError, nearest
        from ..serving.loading import check_adapter

        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        try:
            if word == "/use":
                self.adapter = check_adapter(rest or None, self.adapters)
                self.say(f"answering: {self.adapter or 'base'}")
            elif word == "/reset":
                self.messages = []
                self.say("conversation forgotten")
            elif word == "/system":
                self.system, self.messages = rest or None, []
                self.say(f"system message {'set' if rest else 'removed'}, conversation forgotten")
            elif word == "/help":
                self.say(f"{HELP}\nadapters: {', '.join([*self.adapters, 'base'])}")
            elif word.startswith("/"):
                self.say(f"unknown command {word}{nearest(word, ['/use', '/reset', '/system', '/help', '/quit'])}; {HELP}")
            elif line.strip():
                self.answer(line)
        except GraftworkError as error:
            self.say(f"error: {error}")
        return True

    def answer(self, line: str) -> None:
        """Streams the answer to stdout; Ctrl-C ends it and keeps what was written."""
        from ..serving.generate import stream

        prompt = self._prompt(line)
        pieces: list[str] = []
        try:
            for piece in stream(self.model, self.tokenizer, prompt, adapter=self.adapter, **self.options):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            self.say("\n(stopped)")
        print(flush=True)
        text = "".join(pieces)
        if self.tokenizer.chat_template is not None and text.strip():
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]

    def _prompt(self, line: str):
        """The conversation with the new line; the oldest turns go when it no longer leaves room for an answer."""
        from ..serving.generate import context_length, encode_prompt

        if self.tokenizer.chat_template is None:
            return line
        head = [{"role": "system", "content": self.system}] if self.system else []
        room, dropped = context_length(self.model), 0
        while True:
            ids = encode_prompt(self.tokenizer, [*head, *self.messages, {"role": "user", "content": line}])
            if room is None or not self.messages or len(ids) + min(self.options["max_new_tokens"], room // 4) <= room:
                break
            self.messages, dropped = self.messages[2:], dropped + 1
        if dropped:
            self.say(f"note: the {dropped} oldest turns no longer fit the context and are forgotten")
        return ids
