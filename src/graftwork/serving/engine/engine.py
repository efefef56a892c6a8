"""The engine: requests in, tokens out, one packed batch a step over one base and many adapters.

    scheduler.step()  ->  one packed row of all segments  ->  the model, unmodified, on the pool  ->  tokens

A step holds new tokens of every request that runs: one for those that write, a piece of the prompt for those that begin. The
base multiplies all of them at once; every site adds to each token what its request's adapter adds (`graftwork.routing` by
token). The engine is single-threaded and keeps no clock of its own: whoever drives it calls `step` as long as it has work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...adapters.model_scope import PrefixScope, Prompts
from ...adapters.slot import Route, bank_bytes, bytes_beside
from ...errors import GraftworkError, UsageError
from ...modeling.state import state_of
from ..generate import end_tokens, positions
from .adapters import Attached, checked_sum, prefix_of
from .attention import NAME, Given, Packed, Segment, attention_of, cells_of, layer_shapes
from .guides import Guides
from .memory import Memory, Source
from .merged import MergedCopy
from .merging import Merging
from .policies import make_policy
from .pool import Pool
from .request import Request, Status
from .sampling import choose
from .scheduler import Limits, Policy, Scheduler, Step
from .text import Detokenizer


class Engine:
    """model: a causal decoder in evaluation mode, as `graftwork.load` gives it; the engine has it for itself until `close`.

    pool_bytes: of keys, values and adapters together. adapters: where they come from; left out, requests name grafts that are
    attached to the model. gaps: record the difference of the two highest logits of every step. merge: an adapter that most requests
    ask for is merged into a copy of the weights, and runs alone in steps without its cost (merging.py says when); the copy lies beside
    the pool. Raises IncompatibleError for models whose layers are not softmax attention, and for merge on a base that is not dense;
    UsageError for a pool without room."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, pool_bytes: int = 1 << 30, page_tokens: int = 16,
                 adapters: Source | None = None, limits: Limits | None = None, policy: str | Policy = "fcfs",
                 prefix_cache: bool = True, gaps: bool = False, merge: bool = False, clock: Callable[[], float] = time.monotonic):
        self.model, self.tokenizer, self.gaps, self.clock = model, tokenizer, gaps, clock
        self.merging = Merging() if merge else None
        self._copy = MergedCopy(model) if merge else None
        self.adapters = adapters or Attached(model)
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        shapes = layer_shapes(model)
        page = page_tokens * sum(s.heads * (s.key_width + s.value_width) for s in shapes) * weight.dtype.itemsize
        self.pool = Pool(shapes, pool_bytes // page, page_tokens=page_tokens, dtype=weight.dtype, device=self.device)
        self.memory = Memory(self.pool, self.adapters, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.memory, limits or Limits(), policy if isinstance(policy, Policy) else make_policy(policy), clock)
        self.ends = end_tokens(model, tokenizer)
        self.context = positions(model)
        self.requests: dict[str, Request] = {}
        self.texts: dict[str, Detokenizer] = {}
        self._guides: Guides | None = None
        self.steps = 0
        self.absent: Callable[[Request], None] | None = None  # told of a request whose adapter has to be read before it waits again
        self._open = ExitStack()
        self._open.enter_context(attention_of(model, NAME))
        self._head_rows: torch.Tensor | None = None  # of the tokens that the output head sees in the step that runs
        head = model.get_output_embeddings()
        if head is not None:
            self._open.callback(head.register_forward_pre_hook(self._at_head).remove)
        model.eval()

    def close(self) -> None:
        """Give the model back as it was; requests that run are aborted."""
        for request in list(self.requests.values()):
            self._end(request, "abort")
        self.memory.clear()
        if self._copy is not None:
            self._copy.drop()
        self._open.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # -- requests -------------------------------------------------------------------------------------------------------------
    def add(self, request: Request) -> None:
        """Queue a request. Raises UsageError for one that can never run: too long for the context or for the pool, an unknown
        adapter, an id that is taken."""
        if request.id in self.requests:
            raise UsageError(f"a request '{request.id}' is there already", remedy="give every request an id of its own")
        if not request.prompt:
            raise UsageError("the prompt is empty", remedy="send at least one token")
        pages = 0
        if request.adapter is not None and not isinstance(request.adapter, str):
            request.adapter = checked_sum(request.adapter)
        if request.adapter is not None:
            digest = self.adapters.digest(request.adapter)
            pages, request.virtual = self.pool.pack(self.adapters.sizes(digest)).pages, self.adapters.virtual(digest, request.prompt)
        if self.context is not None and request.length >= self.context:
            before = f" behind {len(request.virtual)} virtual ones" if request.virtual else ""
            raise UsageError(f"the prompt has {len(request.prompt)} tokens{before}, the model's context {self.context}",
                             remedy="shorten the prompt")
        worst = self.pool.pages_for(min(request.worst, self.context or request.worst))
        if worst + pages > self.pool.pages:
            raise UsageError(f"the request may need {worst + pages} pages of memory, the pool has {self.pool.pages}",
                             remedy="ask for fewer tokens, or give the pool more memory")
        if request.sampling.guide is not None:
            if self._guides is None:
                self._guides = Guides(self.tokenizer, self.model.get_output_embeddings().weight.shape[0], self.ends)
            request.guide = self._guides.make(request.sampling.guide)
        self.requests[request.id] = request
        self.texts[request.id] = Detokenizer(self.tokenizer, request.sampling.stop)
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> bool:
        """End a request early; False when there is no such request any more."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request, "abort")
        return request is not None

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        request.error = error
        self._end(request, "error")

    def load_ahead(self, count: int = 4) -> bool:
        """Copy the adapter of one of the next requests into free pages; whether there was one to copy."""
        return any(self.memory.load_ahead(request) for request in self.scheduler.waiting[:count])

    def bank_bytes(self) -> int:
        """Bytes that sites keep beside the pool: adapters side by side as the kernels read them. A cache: it goes when one of its
        adapters leaves the pool."""
        return bank_bytes(self.model)

    def bytes_beside(self) -> int:
        """Bytes that adapters take beside the pool: those banks, and what a method draws from a seed or takes from the weights when it
        is loaded. They go with the adapter; what they may be at most depends on the adapters that the pool has room for. For the
        thread that steps."""
        return bytes_beside(self.model, self.pool.buffer)

    def merged_bytes(self) -> int:
        """Bytes of merged weights, which lie beside the base and the pool; they stay until another adapter is merged."""
        return 0 if self._copy is None else self._copy.nbytes

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def run(self) -> None:
        """Step until nothing is left. Raises GraftworkError if requests wait for memory that never comes."""
        while self.busy:
            if not self.step() and self.busy:
                raise GraftworkError("requests wait for memory and nothing runs that could give it back",
                                     remedy="give the pool more memory")

    # -- a step -----------------------------------------------------------------------------------------------------------------
    def step(self) -> bool:
        """Compute one step; False when there was nothing to compute."""
        step = self.scheduler.step() if self.merging is None else self.merging.step(self.scheduler)
        for request in step.aborted:
            self._end(request, "abort")
        for request, _ in step.work:
            if request.computed < len(request.virtual):
                try:
                    self._make_prefix(request)
                except GraftworkError as error:  # of this request's adapter: the others go on
                    step.failed.append((request, error))
        for request, error in step.failed:
            self.fail(request, error)
        for request in step.absent:
            self.absent(request)
        step.work = [(request, count) for request, count in step.work if request.error is None]
        if not step.work:
            return bool(step.aborted or step.failed or step.absent)
        self.steps += 1
        begin = self.clock()
        merged = None if self.merging is None else self._copy.ready(step, self.merging)
        ready, running = self.clock(), len(self.scheduler.running)
        logits, writers = self._forward(step, merged)
        for request, count in step.work:
            request.computed += count
            self.memory.computed(request)
        tokens = choose(logits, writers, self.ends, self.gaps) if writers else []
        if self.merging is not None:
            self.merging.ran(step, running, self.clock() - ready, ready - begin)
        for request, token in zip(writers, tokens):
            self._take(request, token)
        return True

    @torch.no_grad()
    def _forward(self, step: Step, merged: Route | None) -> tuple[torch.Tensor, list[Request]]:
        """Logits of the requests whose pending tokens are all in this step, and those requests. merged: all rows use the weights that
        this route is merged into."""
        ids: list[int] = []
        places: list[int] = []
        rows: list[int] = []
        new: list[torch.Tensor] = []
        last: list[int] = []
        segments, names, writers, given = [], [], [], []
        embedded: list[tuple[int, torch.Tensor]] = []
        for number, (request, count) in enumerate(step.work):
            first, stop = request.computed, request.computed + count
            cells = cells_of(request.pages, stop, self.pool.page_tokens, self.device)
            segments.append(Segment(len(ids), len(ids) + count, cells))
            new.append(torch.arange(cells.stop - count, cells.stop, device=self.device) if isinstance(cells, slice) else cells[-count:])
            if first < len(request.virtual):
                rows_of, table = self._virtual(request, slice(first, min(stop, len(request.virtual))))
                embedded.append((len(ids), rows_of))
                if table is not None:
                    given.append(Given(new[-1][: rows_of.shape[0]], table))
            ids += request.output[-1:] if count == 1 and stop == request.length and request.output else request.tokens[first:stop]
            places += range(first, stop)
            rows += [number] * count
            names.append(None if request.resident is None or merged is not None else request.resident.route)
            if stop == request.length:
                last.append(len(ids) - 1)
                writers.append(request)
        packed = Packed(self.pool, torch.cat(new), segments, given)
        # a step that only decodes has its rows in order, and what sites make of them is kept from step to step
        token_rows = None if len(ids) == len(names) else torch.tensor(rows, device=self.device)
        keep = torch.tensor(last or [0], device=self.device)  # without a writer one token all the same: empty products are a special case
        self._head_rows = None if token_rows is None else token_rows.index_select(0, keep)
        with state_of(self.model).scope(rows=tuple(names), token_rows=token_rows, packed=True, merged=merged):
            row = torch.tensor([ids], device=self.device)
            text = {"input_ids": row}
            if embedded:
                vectors = self.model.get_input_embeddings()(row.clamp_(min=0)).clone()
                for at, virtual in embedded:
                    vectors[0, at: at + virtual.shape[0]] = virtual.to(vectors.dtype)
                text = {"inputs_embeds": vectors}
            out = self.model(**text, position_ids=torch.tensor([places], device=self.device), use_cache=False, packed=packed,
                             logits_to_keep=keep)
        self._head_rows = None
        return out.logits[0], writers

    def _at_head(self, head: nn.Module, args: tuple) -> None:
        """The model gives its head the last tokens alone: an adapter of the head has to know whose they are."""
        if self._head_rows is not None:
            holder = state_of(self.model)
            holder.current = replace(holder.current, token_rows=self._head_rows)

    def _virtual(self, request: Request, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of these virtual tokens of a request: the embeddings (n, d), and keys and values (layers, 2, n, ...) or None."""
        assert request.prefix is not None
        vectors, table = request.prefix[1][part], prefix_of(self.model, request.resident.route).keys_values()
        if part.stop == len(request.virtual):
            request.prefix = None
        return vectors, None if table is None else table[:, :, part]

    @torch.no_grad()
    def _make_prefix(self, request: Request) -> None:
        """The embeddings of a request's virtual tokens, made once from its whole prompt, before any step scopes a route."""
        route = request.resident.route
        if request.prefix is None or request.prefix[0] != route:
            ids = torch.tensor([request.prompt], device=self.device)
            prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
            request.prefix = route, prefix_of(self.model, route).prefix(prompts, PrefixScope.of(self.model).base)[0]

    def _take(self, request: Request, token: int) -> None:
        now, sampling = self.clock(), request.sampling
        request.output.append(token)
        if request.first_token is None:
            request.first_token = now
        self.scheduler.policy.wrote(request, 1)
        if request.guide is not None:
            request.guide.take(token)
        reason = None
        ended = token in sampling.stop_token_ids or (token in self.ends and not sampling.ignore_eos)
        if ended:
            reason = "stop"
        else:
            text = self.texts[request.id]
            if sampling.stop or request.listen is not None:
                text.add(request.output)
            if text.stopped or (request.guide is not None and request.guide.done):
                reason = "stop"
            elif len(request.output) >= sampling.max_tokens or request.length >= (self.context or request.length + 1):
                reason = "length"
        if reason is not None:
            self._end(request, reason, ended=ended, told=[token])
        elif request.listen is not None:
            request.listen(request, [token])

    def text(self, request: Request) -> Detokenizer:
        """The request's text; after its end the whole of it."""
        return self.texts[request.id] if request.id in self.texts else request.text

    def _end(self, request: Request, reason: str, ended: bool = False, told: list[int] | None = None) -> None:
        self.scheduler.finish(request)
        self.requests.pop(request.id, None)
        request.text = self.texts.pop(request.id)
        request.text.add(request.output[:-1] if ended else request.output, final=True)
        request.finish_reason, request.ended, request.status = reason, self.clock(), Status.FINISHED
        if request.listen is not None:
            request.listen(request, told or [])
