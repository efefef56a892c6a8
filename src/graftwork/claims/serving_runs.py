"""What the serving claims share: a base, adapters on it, engines that advance step by step, and the constants of a simulated server.

Contenders share one set of weights in one process and advance in turn, one step each, in an order that rotates; times are processor
time, so that other programs fall on all of them alike. --quick takes a small random Llama in place of SmolLM2-135M.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = 16
#: of SmolLM2-135M in fp32 on one thread (benchmarks/serving.py, least squares over the steps of its part `many`), in seconds
STEP = {"fixed": 0.157, "token": 0.00359, "adapter": 0.00519, "byte": 9.26e-9}


def base(quick: bool, blocks: int = 2) -> tuple[Any, Any]:
    """(model, tokenizer) in fp32, frozen."""
    from .bases import characters, small_llama

    if quick:
        tokenizer = characters()
        return small_llama(len(tokenizer), 0, width=96, blocks=blocks).requires_grad_(False), tokenizer
    from .. import load

    model, tokenizer = load("smollm2-135m-instruct", dtype="fp32")
    return model.eval().requires_grad_(False), tokenizer


def twin(model: Any) -> Any:
    """The model once more, on the same weights and without grafts."""
    own = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    own.__dict__.pop("graft_state", None)
    return own


def fill(graft: Any, seed: int, size: float = 0.02) -> Any:
    """Random frozen values in all that a graft trains: no factor is zero, so nothing can be left out."""
    from .probes import scatter

    scatter(graft, seed, size)
    for parameter in graft.parameters():
        parameter.requires_grad_(False)
    return graft


def with_grafts(model: Any, count: int, method: str = "lora", **options: Any) -> Any:
    """A twin with the grafts a0, a1, ..."""
    import graftwork

    own = twin(model)
    for k in range(count):
        fill(graftwork.attach(own, method, name=f"a{k}", seed=k, **options), k)
    return own


def write_adapters(model: Any, root: Path, ranks: dict[int, int], **options: Any) -> None:
    """LoRA artifacts a0, a1, ... of these ranks in a folder."""
    import graftwork

    own = twin(model)
    for number, rank in ranks.items():
        graft = fill(graftwork.attach(own, "lora", name=f"a{number}", r=rank, alpha=rank, seed=number, **options), number)
        graft.save(root / f"a{number}")
        graft.detach()


def prompts(model: Any, lengths: Iterable[int], seed: int = 1) -> list[list[int]]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, model.config.vocab_size, (n,), generator=draw).tolist() for n in lengths]


class Run:
    """An engine with all its requests, one step at a time. answers: how many tokens each writes."""

    def __init__(self, model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], names: Sequence[Any], answers: Sequence[int] | int, *,
                 pool: int = 256 << 20, prefix_cache: bool = False, running: int | None = None, **options: Any):
        from ..serving.engine import Engine, Limits, Request, Sampling

        limits = Limits(max_running=running) if running else Limits()
        self.engine = Engine(model, tokenizer, pool_bytes=pool, page_tokens=PAGE, prefix_cache=prefix_cache, limits=limits, **options)
        answers = [answers] * len(ids) if isinstance(answers, int) else list(answers)
        self.requests = [Request(f"{i}", list(row), name, Sampling(max_tokens=new, ignore_eos=True))
                         for i, (row, name, new) in enumerate(zip(ids, names, answers))]
        self.seconds: list[float] = []
        for request in self.requests:
            self.engine.add(request)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def step(self) -> None:
        start = time.process_time()
        self.engine.step()
        self.seconds.append(time.process_time() - start)

    @property
    def written(self) -> int:
        return sum(len(r.output) for r in self.requests)

    def finish(self) -> Run:
        """To the end of all answers; the pool is given up then."""
        while self.busy:
            self.step()
        self.engine.close()
        return self


def race(runs: dict[str, Run]) -> dict[str, Run]:
    """All runs to their ends, a step each in turn."""
    turn, order = 0, list(runs.values())
    while any(run.busy for run in order):
        for run in order[turn % len(order):] + order[:turn % len(order)]:
            if run.busy:
                run.step()
        turn += 1
    return {name: run.finish() for name, run in runs.items()}


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """{name: middle of its seconds of processor time}, interleaved in rotating order; a first call each is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        for name in order[turn % len(order):] + order[:turn % len(order)]:
            start = time.process_time()
            calls[name]()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in found.items()}


def machine(memory: int = 1 << 30, *, switch: float = 0.0) -> Any:
    """A simulated server of SmolLM2-135M in fp32 (30 layers, 3 key/value heads of 64, LoRA on q and v) with so much memory for caches
    and adapters."""
    import torch

    from ..serving.engine.pool import LayerShape
    from ..serving.simulate import Machine, StepCost, lora_sizes

    layers, heads = 30, 3
    page = PAGE * layers * heads * 2 * 64 * 4
    return Machine(StepCost(**STEP, switch=switch), tuple(LayerShape(heads, 64, 64) for _ in range(layers)), memory // page,
                   lora_sizes([(576, 576), (576, 192)], layers, 4), PAGE, torch.float32)
