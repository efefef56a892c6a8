"""What is asked of the engine, and a request while it is answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ...errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. top_p, top_k (0: all), min_p (share of the likeliest token's probability)
    restrict sampling. repetition_penalty (1: none) divides the logits of tokens seen in prompt or answer, presence_penalty and
    frequency_penalty are subtracted for tokens of the answer. logit_bias: added, by token. stop: texts; stop_token_ids: tokens.
    ignore_eos: go on to max_tokens. min_tokens: no end before. logprobs: how many alternatives to report (None: none).
    guide: {"json_schema": ...}, {"regex": ...}, {"grammar": ...} or {"json_object": True}."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    guide: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        wrong = [text for bad, text in [
            (self.max_tokens < 1, f"max_tokens is {self.max_tokens}, it must be 1 or more"),
            (not self.temperature >= 0, f"temperature is {self.temperature}, it must be 0 (greedy) or more"),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, it must lie in (0, 1]"),
            (self.top_k < 0, f"top_k is {self.top_k}, it must be 0 (all) or more"),
            (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}, it must lie in [0, 1]"),
            (not self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}, it must be above 0"),
            (not -2 <= self.presence_penalty <= 2, f"presence_penalty is {self.presence_penalty}, it must lie in [-2, 2]"),
            (not -2 <= self.frequency_penalty <= 2, f"frequency_penalty is {self.frequency_penalty}, it must lie in [-2, 2]"),
            (not 0 <= self.min_tokens <= self.max_tokens, f"min_tokens is {self.min_tokens}, it must lie in [0, max_tokens]"),
            (self.logprobs is not None and not 0 <= self.logprobs <= 20, f"logprobs is {self.logprobs}, it must lie in [0, 20]"),
            (any(not -100 <= b <= 100 for b in self.logit_bias.values()), "a logit_bias lies outside [-100, 100]"),
            ("" in self.stop, "a stop text is empty")] if bad]
        if wrong:
            raise UsageError("; ".join(wrong), remedy="correct the option")

    @property
    def plain(self) -> bool:
        """Greedy, and nothing touches the logits."""
        return (self.temperature == 0 and self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
                and not self.logit_bias and self.guide is None and not self.min_tokens)


#: adapters and their weights in a sum
Sum = Sequence[tuple[str, float]]


class Status(Enum):
    READING = "reading"  # its adapter has to come into host memory before it can wait
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of the chosen token under the model's own distribution, and of the likeliest ones [(token, value)]."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """prompt: token ids. adapter: its name, None for the bare base, or [(name, weight), ...] for the sum of their changes. tenant:
    whose share of the server it uses. priority: smaller goes first. deadline: seconds from arrival by which the first token is
    due (early abort); None: none. listen(request, tokens) is called by the engine after each step that gave it tokens, and once
    with none when it has ended.

    finish_reason: stop, length, abort, or error; error: the reason in words."""

    id: str
    prompt: Sequence[int]
    adapter: str | Sum | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    deadline: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    listen: Callable[[Request, list[int]], None] | None = field(default=None, repr=False)

    # what the engine keeps
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    computed: int = 0  # tokens whose keys and values lie in the pool
    cached: int = 0  # of those, how many came from other requests
    virtual: tuple[int, ...] = ()  # below zero: stand for its adapter's virtual tokens, see `Source.virtual`
    prefix: tuple[str, torch.Tensor] | None = field(default=None, repr=False)  # (route, embeddings), until all are computed
    pages: list[int] = field(default_factory=list)
    resident: Any = None  # its adapter in the pool, while it runs
    digest: str | None = None  # content of its adapter when it last began to run; an answer ends with what it began with
    preempted: int = 0
    first_token: float | None = None
    ended: float | None = None
    guide: Any = None
    text: Any = None  # its Detokenizer, once it has ended
    generator: torch.Generator | None = None

    @property
    def tokens(self) -> list[int]:
        """What its cells hold, in order: virtual tokens, prompt, answer so far."""
        return [*self.virtual, *self.prompt, *self.output]

    @property
    def length(self) -> int:
        return len(self.virtual) + len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Tokens that have to go through the model before the next one can be chosen."""
        return self.length - self.computed

    @property
    def remaining(self) -> int:
        """Tokens it may still write."""
        return self.sampling.max_tokens - len(self.output)

    @property
    def worst(self) -> int:
        """Tokens in the pool when it ends at its limit."""
        return len(self.virtual) + len(self.prompt) + self.sampling.max_tokens
