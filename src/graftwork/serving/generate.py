"""Offline batched generation in which every row is answered by its own adapter.

Prompts are sorted by length, cut into batches, padded on the left and decoded with a key/value cache. Row i runs under
`routing(model, names)`, so one batch may hold rows of several adapters, methods and ranks and of the bare base. When half
of a batch has finished its rows leave it. Sampling draws from one generator per prompt, by inversion of the cumulative
distribution, so a result depends neither on the batch size nor on the other prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, GraftworkError, IncompatibleError, UsageError
from ..modeling.caches import cache_argument
from ..modeling.state import state_of
from .cache import keep_rows, roomy_cache
from .prefill import can_share, padded, positions_of, shared_prefixes

Prompt = str | list[dict[str, Any]] | list[int]


@dataclass(frozen=True)
class Completion:
    """What was written for one prompt. text: without the token that ended it and from a stop text on; ids: all generated
    tokens, that one included; tokens: their number; finish_reason: "stop" (an end token or a stop text) or "length".
    gaps: where asked for, the difference of the two highest logits at each step."""

    text: str
    tokens: int
    finish_reason: str
    ids: tuple[int, ...] = field(default=(), repr=False)
    gaps: tuple[float, ...] | None = field(default=None, repr=False)


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], *, adapters: Sequence[str | None] | None = None,
             max_new_tokens: int = 256, batch_size: int = 16, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, stop: Sequence[str] = (), gaps: bool = False, numbers: Sequence[int] | None = None,
             progress: Callable[[int, int], None] | None = None) -> list[Completion]:
    """Completions of the prompts, in their order.

    prompts: texts, lists of messages (rendered by the chat template with a generation prompt), or lists of token ids.
    adapters: the graft that answers each prompt, None for the bare base; left out, the model answers as it stands.
    temperature 0 is greedy; top_p and top_k (0: all) restrict sampling. gaps: record the top-2 gap of every step.
    numbers: of each prompt, from which with `seed` its sampling is seeded (default: its place), so that a job may be cut in parts.
    progress(done, total) is called as prompts finish. Raises UsageError (options, unknown adapter), DataError (a prompt
    that is empty, cannot be rendered, or leaves no room in the model's context)."""
    settings = _Settings(max_new_tokens, temperature, top_p, top_k, tuple(stop), gaps, end_tokens(model, tokenizer))
    settings.check(batch_size)
    if adapters is not None and len(adapters) != len(prompts):
        raise UsageError(f"{len(adapters)} adapters are named for {len(prompts)} prompts", remedy="name one per prompt, or None")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            ids = encode_prompt(tokenizer, prompt)
            number = i if numbers is None else numbers[i]
            rows.append(_row(model, ids, number, None if adapters is None else adapters[i], settings, seed))
        except GraftworkError as error:
            raise type(error)(f"prompt {i + 1}: {error.message}", remedy=error.remedy) from None
    done, order = 0, sorted(rows, key=lambda row: (-len(row.prompt), row.index))  # the largest batch comes first
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            for finished in _steps(model, tokenizer, batch, settings, routed=adapters is not None):
                done += finished
                if progress and finished:
                    progress(done, len(rows))
    return [row.completion(tokenizer) for row in rows]


def stream(model: nn.Module, tokenizer: Any, prompt: Prompt, *, adapter: str | None = None, max_new_tokens: int = 256,
           temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
           stop: Sequence[str] = ()) -> Iterator[str]:
    """The completion of one prompt in pieces of text, as they are written; joined they are `generate`'s text.
    adapter: None is the bare base. Text that may yet become a stop text, or half a character, is held back."""
    settings = _Settings(max_new_tokens, temperature, top_p, top_k, tuple(stop), False, end_tokens(model, tokenizer))
    settings.check(1)
    row, shown = _row(model, encode_prompt(tokenizer, prompt), 0, adapter, settings, seed), 0
    with _evaluating(model):
        for _ in _steps(model, tokenizer, [row], settings, routed=True):
            text = row.text(tokenizer)
            if row.reason is None:
                held = max((n for s in settings.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
                text = text[:len(text) - held] if not text.endswith("\ufffd") else text[:shown]
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)


# -- prompts ---------------------------------------------------------------------------------------------------------------
def encode_prompt(tokenizer: Any, prompt: Prompt, *, tools: Sequence[dict] | None = None) -> list[int]:
    """Token ids of a prompt: a text with the tokenizer's leading special tokens, messages by its chat template."""
    from ..data import Renderer, parse_message

    if not isinstance(prompt, str):
        if prompt and all(isinstance(part, int) for part in prompt):
            return list(prompt)
        if not isinstance(prompt, (list, tuple)) or not prompt:
            raise DataError("the prompt is empty" if not prompt else f"a prompt is a text or a list of messages, not {prompt!r}",
                            remedy='write "prompt": "..." or "messages": [{"role": "user", "content": "..."}]')
        messages = [parse_message(message, n) for n, message in enumerate(prompt, 1)]
        if tokenizer.chat_template is None:
            raise UsageError("the tokenizer has no chat template, so messages cannot be rendered",
                             remedy="use an instruct model, or a text prompt")
        try:
            prompt = tokenizer.apply_chat_template(messages, tools=list(tools) if tools else None, tokenize=False,
                                                   add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises what it likes
            raise DataError(f"the chat template refuses the conversation: {error}",
                            remedy="check the order of roles and the fields that this model's template needs") from None
        return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    renderer = Renderer(tokenizer)
    ids = renderer.bos + renderer.ids(prompt)
    if not ids:
        raise DataError("the prompt is empty", remedy="write at least one character")
    return ids


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, the tokenizer's, and what the chat template puts behind a turn."""
    from ..data import Example, Renderer

    found: list[int | None] = []
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value]
    found.append(tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})
        try:
            renderer = Renderer(tokenizer, train_on="last_assistant")
            ids, trained = renderer.encode(Example(messages=turns))
            last = max(i for i, learned in enumerate(trained) if learned)
            found += [ids[last]] if ids[last] in renderer.special else []
        except (GraftworkError, ValueError):  # a template for other roles: the configs have to do
            pass
    return frozenset(int(token) for token in found if token is not None)


def positions(model: nn.Module) -> int | None:
    """How many positions the model has, None where its config names no limit."""
    config = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def context_length(model: nn.Module) -> int | None:
    """Positions the model has for text, None where its config names no limit. A graft's virtual tokens take theirs first."""
    room = positions(model)
    prefixes = [adapter.length for graft in state_of(model).grafts.values() if graft.info.traits["scope"] == "model"
                for adapter in graft.adapters.values()]
    return None if room is None else room - max(prefixes, default=0)


# -- the loop --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    gaps: bool
    ends: frozenset[int]

    def check(self, batch_size: int) -> None:
        wrong = [text for bad, text in [
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}, it must be 1 or more"),
            (batch_size < 1, f"batch_size is {batch_size}, it must be 1 or more"),
            (not self.temperature >= 0, f"temperature is {self.temperature}, it must be 0 (greedy) or more"),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, it must lie in (0, 1]"),
            (self.top_k < 0, f"top_k is {self.top_k}, it must be 0 (all) or more"),
            ("" in self.stop, "a stop text is empty")] if bad]
        if wrong:
            raise UsageError("; ".join(wrong), remedy="correct the option")


class _Row:
    """One prompt while it is being answered."""

    def __init__(self, index: int, prompt: list[int], adapter: str | None, limit: int, generator: torch.Generator):
        self.index, self.prompt, self.adapter, self.limit, self.generator = index, prompt, adapter, limit, generator
        self.ids: list[int] = []
        self.gaps: list[float] = []
        self.reason: str | None = None
        self.cut: str | None = None

    def take(self, token: int, tokenizer: Any, settings: _Settings) -> None:
        self.ids.append(token)
        if token in settings.ends:
            self.reason = "stop"
            return
        if settings.stop:
            text = self.text(tokenizer)
            at = [place for s in settings.stop if (place := text.find(s)) >= 0]
            if at:
                self.reason, self.cut = "stop", text[:min(at)]
                return
        if len(self.ids) >= self.limit:
            self.reason = "length"

    def text(self, tokenizer: Any) -> str:
        if self.cut is not None:
            return self.cut
        ids = self.ids[:-1] if self.reason == "stop" else self.ids
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def completion(self, tokenizer: Any) -> Completion:
        return Completion(self.text(tokenizer), len(self.ids), self.reason or "length", tuple(self.ids), tuple(self.gaps) or None)


def _row(model: nn.Module, ids: list[int], index: int, adapter: str | None, settings: _Settings, seed: int) -> _Row:
    room = context_length(model)
    if room is not None and len(ids) >= room:
        raise DataError(f"the prompt has {len(ids)} tokens, the model's context {room}", remedy="shorten the prompt")
    limit = settings.max_new_tokens if room is None else min(settings.max_new_tokens, room - len(ids))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) & (2**63 - 1))
    return _Row(index, ids, adapter, limit, generator)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@torch.no_grad()
def _steps(model: nn.Module, tokenizer: Any, rows: list[_Row], settings: _Settings, *, routed: bool) -> Iterator[int]:
    """Decodes a batch to its end; after each step yields how many rows finished in it."""
    from ..adapters import routing
    from ..data import pad_token_of

    device, pad = model.get_input_embeddings().weight.device, pad_token_of(tokenizer)
    prompts, names, new = [row.prompt for row in rows], [row.adapter for row in rows], max(row.limit for row in rows)
    known, cache_name = inspect.signature(type(model).forward).parameters, cache_argument(model)
    if cache_name is None:
        raise IncompatibleError(f"a model of type '{model.config.model_type}' keeps its state outside the cache: its prompts cannot be "
                                "batched", remedy="use model.generate of Transformers, one prompt at a time (graftwork.routing names the "
                                "adapter)")
    cache = roomy_cache(model.config, 2 * max(map(len, prompts)) + new)

    def forward(ids: Tensor, mask: Tensor, positions: Tensor, names: list[str | None]) -> Tensor:
        call = {"input_ids": ids, "attention_mask": mask, cache_name: cache, "use_cache": True}
        if "position_ids" in known:
            call["position_ids"] = positions
        elif ids.shape[1] < mask.shape[1]:  # without positions nothing looks back: the state has seen what was masked
            del call["attention_mask"]
        if "logits_to_keep" in known:
            call["logits_to_keep"] = 1
        with routing(model, names) if routed else nullcontext():
            return model(**call).logits[:, -1]

    shared = shared_prefixes(prompts, names) if can_share(model, cache) else None
    if shared is not None:
        leaders = list(dict.fromkeys(leader for leader, _ in shared))
        lengths = dict(shared)
        ids, seen = padded([prompts[i][:lengths[i]] for i in leaders], pad, device)
        forward(ids, seen, positions_of(seen), [names[i] for i in leaders])
        group = torch.tensor([leaders.index(leader) for leader, _ in shared], device=device)
        keep_rows(cache, group)
        ids, own = padded([prompt[length:] for prompt, (_, length) in zip(prompts, shared)], pad, device)
        mask = torch.cat([seen.index_select(0, group), own], dim=1)
    else:
        ids, mask = padded(prompts, pad, device)
    width = mask.shape[1]
    positions = positions_of(mask)[:, -ids.shape[1]:]
    mask = torch.cat([mask, mask.new_ones(len(rows), new)], dim=1)
    while True:
        logits = forward(ids, mask[:, :width], positions, [row.adapter for row in rows])
        finished, tokens = 0, _choose(logits.float(), rows, settings)
        for row, token in zip(rows, tokens):
            if row.reason is None:
                row.take(token, tokenizer, settings)
                finished += row.reason is not None
        yield finished
        going = [i for i, row in enumerate(rows) if row.reason is None]
        if not going:
            return
        positions = positions[:, -1:] + 1
        if 2 * len(going) <= len(rows):  # rows leave in bulk, since each time the whole cache is copied
            keep = torch.tensor(going, device=device)
            keep_rows(cache, keep)
            mask, positions = mask.index_select(0, keep), positions.index_select(0, keep)
            rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
        ids, width = torch.tensor(tokens, device=device)[:, None], width + 1


def _choose(logits: Tensor, rows: list[_Row], settings: _Settings) -> list[int]:
    """One token per row from logits (N, V) in fp32."""
    if settings.gaps:
        top = logits.topk(2, dim=-1).values
        for row, gap in zip(rows, (top[:, 0] - top[:, 1]).tolist()):
            if row.reason is None:
                row.gaps.append(gap)
    if settings.temperature == 0:
        return logits.argmax(-1).tolist()
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    values = values / settings.temperature
    if settings.top_k:
        values = values[:, :settings.top_k]
    shares = values.double().softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = torch.where(before < settings.top_p, shares, 0.0)  # the first token stays, whatever top_p
    total = shares.cumsum(-1)
    drawn = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows]).to(logits.device)
    place = (total <= drawn[:, None] * total[:, -1:]).sum(-1, keepdim=True)
    place = torch.minimum(place, (shares > 0).sum(-1, keepdim=True) - 1)
    return order.gather(-1, place).squeeze(-1).tolist()
