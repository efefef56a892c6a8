"""The HTTP server: OpenAI's completions and chat, vLLM's loading of adapters, and what operators need.

`create_app(engine, options)` makes a FastAPI app around one engine. An adapter is one more entry of /v1/models, chosen by
`model`; a name that is not there is a 404 and never the base. See docs/serving.md for the commands and every field.
"""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ...errors import GraftworkError, UsageError
from ..engine import Engine
from ..engine import Request as EngineRequest
from ..engine.request import Sum
from ..generate import encode_prompt
from ..sources import Reference
from .adapters import Catalog
from .answers import Answer, ChatForm, ClientGone, EventStream, Form, Json, unless_gone
from .assets import add_page
from .edge import FACTS, Edge
from .errors import CODES, SCHEMA, ApiError, Unavailable, UnknownAdapter, api_error, unknown_model
from .keys import Key, Keys
from .loop import EngineLoop
from .metrics import Metrics
from .schemas import (
    AliasRequest,
    Asked,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    TokenizeRequest,
    UnloadRequest,
)
from .status import Watch, show

MAX_CHOICES = 64  # of one call: prompts times n


@dataclass(frozen=True)
class ServerOptions:
    """model: the base's name for clients. allow_load: adapters may be loaded and unloaded. max_body: bytes of a request, which have to
    come within body_seconds. max_prompt: tokens, at most the context. max_queue: requests that wait; more get 429. max_seconds: of a
    request. chat_tokens: of a chat answer that names no limit. deadline: seconds to the first token, for the policy early_abort. drain:
    seconds that a stop waits for answers. page: whether there is one at `/`."""

    model: str
    allow_load: bool = False
    max_body: int = 4 << 20
    body_seconds: float = 60.0
    max_prompt: int | None = None
    max_queue: int = 1024
    max_seconds: float = 600.0
    chat_tokens: int = 512
    deadline: float | None = None
    drain: float = 30.0
    page: bool = True


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, options: ServerOptions, catalog: Catalog | None, keys: Keys | None):
        self.engine, self.options, self.catalog, self.keys = engine, options, catalog, keys
        self.loop = EngineLoop(engine, catalog=catalog)
        self.metrics = Metrics(self.loop, options.model)
        self.watch = Watch(self.loop, catalog)
        self.loop.on_end = self.metrics.ended
        # the engine's thread decodes with the other one; one thread, since a tokenizer is not to be used by several
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="graftwork-tokenizer")
        self.vocabulary = engine.model.get_output_embeddings().weight.shape[0]
        self.inputs = engine.model.get_input_embeddings().weight.shape[0]
        self.started = int(time.time())
        self.token_text: Callable[[int], str] = lru_cache(1 << 16)(lambda token: self.tokenizer.decode([token]))
        limits = [limit for limit in (options.max_prompt, None if engine.context is None else engine.context - 1) if limit is not None]
        self.max_prompt = min(limits, default=None)

    # -- who and which --------------------------------------------------------------------------------------------------------
    async def key(self, request: Request) -> Key | None:
        """Who asks. Raises ApiError 401 and 429."""
        if self.keys is None:
            return None
        key = self.keys.find(request.headers.get("authorization"))
        request.scope[FACTS]["key"] = key.name
        if request.method != "GET":
            key.count(self.keys.clock())
        return key

    def adapter(self, model: str, key: Key | None, param: str = "model") -> str | None:
        """The adapter of a model's name, None for the base. param: the field that named it. Raises ApiError 404."""
        if key is None or key.may_use(model):
            if model == self.options.model:
                return None
            if self.catalog is not None:
                try:
                    self.catalog.target(model)
                    return model
                except UnknownAdapter:
                    pass
        raise unknown_model(model, param)

    def chosen(self, asked: Asked, key: Key | None) -> str | Sum | None:
        """What a request runs on: an adapter, the sum of several, or None for the base. Raises ApiError 404, and 400 where `adapters` go
        with something else than the base."""
        model = self.adapter(asked.model, key)
        if asked.adapters is None:
            return model
        if model is not None:
            raise ApiError(400, f"adapters are added up on the base: send model '{self.options.model}'", param="adapters")
        parts = tuple((part.name, part.weight) for part in asked.adapters)
        for name, _ in parts:
            if self.adapter(name, key, "adapters") is None:
                raise ApiError(400, f"'{name}' is the base and no adapter", param="adapters")
        return parts

    def models(self, key: Key | None) -> list[dict[str, Any]]:
        base = self.options.model
        found = [self.entry(base, None)] if key is None or key.may_use(base) else []
        for name in [] if self.catalog is None else self.catalog.names():
            if key is None or key.may_use(name):
                found.append(self.entry(name, name))
        return found

    def entry(self, name: str, adapter: str | None) -> dict[str, Any]:
        base = self.options.model
        found = {"id": name, "object": "model", "created": self.started, "owned_by": "graftwork", "root": base, "parent": None,
                 "max_model_len": self.engine.context}
        if adapter is not None:
            found.update(root=self.catalog.where(adapter), parent=base)
            alias = self.catalog.alias(adapter)
            found.update({} if alias is None else {"alias_of": alias})
        return found

    # -- tokens -----------------------------------------------------------------------------------------------------------------
    async def tokenized(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.encoder, function, *arguments)

    async def encode(self, prompt: str | list) -> list[int]:
        """Raises GraftworkError, and ApiError for a prompt that is too long."""
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            ids = prompt
            wrong = [token for token in ids if not 0 <= token < self.inputs]
            if wrong:
                raise ApiError(400, f"prompt: there is no token {wrong[0]}; tokens are 0 to {self.inputs - 1}", param="prompt")
        else:
            ids = await self.tokenized(encode_prompt, self.tokenizer, prompt)
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if self.max_prompt is not None and len(ids) > self.max_prompt:
            raise ApiError(400, f"the prompt has {len(ids)} tokens, at most {self.max_prompt} are allowed", param="prompt",
                           code="context_length_exceeded")
        return ids

    # -- answers ----------------------------------------------------------------------------------------------------------------
    async def answer(self, http: Request, key: Key | None, asked: Asked, prompts: Sequence[str | list], form: type[Form],
                     default_tokens: int) -> Response:
        """Raises ApiError and GraftworkError before anything is sent."""
        facts, options = http.scope[FACTS], self.options
        until = asyncio.get_running_loop().time() + options.max_seconds
        n, call = asked.n or 1, uuid.uuid4().hex
        facts.update(model=asked.model[:200], stream=bool(asked.stream))
        adapter = self.chosen(asked, key)
        if asked.adapters is not None:
            facts.update(adapters=[part.name[:200] for part in asked.adapters])
        asked.check_tokens(self.vocabulary)
        if not prompts or len(prompts) * n > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts with {n} answers each; a call has 1 to {MAX_CHOICES} answers", param="prompt")
        if self.loop.waiting + len(prompts) * n > options.max_queue:
            raise ApiError(429, f"{self.loop.waiting} requests are waiting already", code="queue_full", headers={"retry-after": "1"})
        tenant = "" if key is None else key.name
        requests = []
        for prompt in prompts:
            ids = await self.encode(prompt)
            room = None if self.engine.context is None else self.engine.context - len(ids)
            limit = max(default_tokens, asked.min_tokens or 0) if asked.limit is None else asked.limit
            limit = limit if room is None else min(limit, room)
            for choice in range(n):
                requests.append(EngineRequest(f"{call}-{len(requests)}", ids, adapter, asked.sampling(limit, choice), tenant=tenant,
                                              deadline=options.deadline))
        stream = self.loop.submit(requests)
        shown = Answer(stream, form(call, asked.model, asked.reported, self.token_text), until, n)
        facts["requests"] = len(requests)

        def closed() -> None:
            stream.cancel()
            facts.update(prompt_tokens=sum(len(r.prompt) for r in requests[::n]), completion_tokens=sum(len(r.output) for r in requests),
                         finish=[r.finish_reason or "abort" for r in requests])

        handed_over = False
        try:
            if asked.stream:
                first = await unless_gone(http.receive, shown.next())
                handed_over = True  # the response calls `closed`
                return EventStream(shown.events(first, asked.usage_at_end), closed)
            return Json(await unless_gone(http.receive, shown.whole()))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the log does
        finally:
            if not handed_over:
                closed()

    # -- adapters at run time ---------------------------------------------------------------------------------------------------
    def managing(self, name: str, key: Key | None) -> Catalog:
        """Raises ApiError 403 where adapters may not be changed."""
        if not self.options.allow_load or self.catalog is None:
            raise ApiError(403, "this server does not load or unload adapters at run time; it was started without --allow-load",
                           code="not_allowed")
        if key is not None and not (key.manage and key.may_use(name)):
            raise ApiError(403, "this key may not load or unload adapters of this name", code="not_allowed")
        return self.catalog

    async def load(self, asked: LoadRequest, key: Key | None) -> str:
        """The adapter is read, tried out in the engine, and only then written into the book."""
        catalog, name = self.managing(asked.lora_name, key), asked.lora_name
        place = catalog.allowed(asked.lora_path)
        if not asked.load_inplace:
            catalog.free(name)
        target = await self.loop.aside(lambda: catalog.at(name, place))
        hold = f"load-{uuid.uuid4().hex}"
        try:
            digest = await self.loop.read(target, hold)
            await self.loop.call(lambda: self.try_out(digest))
            there = target.place if isinstance(place, Reference) else place
            replaced = await self.loop.aside(lambda: catalog.put(name, there, replace=bool(asked.load_inplace)))
        finally:
            self.loop.release(hold)
        return f"Success: LoRA adapter '{name}' {'replaced' if replaced else 'added'} successfully."

    def try_out(self, digest: str) -> None:
        """In the engine's thread: read an adapter and put it into the pool, as far as there is room. Raises GraftworkError."""
        memory = self.engine.memory
        pages = self.engine.pool.pack(self.catalog.sizes(digest)).pages
        if pages > self.engine.pool.pages:
            raise UsageError(f"the adapter takes {pages} pages of memory, the pool has {self.engine.pool.pages}",
                             remedy="give the pool more memory: --pool")
        memory.resident(digest)

    async def unload(self, asked: UnloadRequest, key: Key | None) -> str:
        catalog, name = self.managing(asked.lora_name, key), asked.lora_name
        digest = None if catalog.alias(name) else catalog.known(catalog.target(name))
        await self.loop.aside(lambda: catalog.remove(name))

        def drop() -> None:
            resident = self.engine.memory.residents.get(digest)
            if resident is not None and not resident.users:  # of another name's too, which loads it again
                self.engine.memory.drop(digest)

        await self.loop.call(drop)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def point(self, asked: AliasRequest, key: Key | None) -> dict[str, Any]:
        self.managing(f"{asked.name}@{asked.version}", key)
        catalog = self.managing(asked.name, key)
        before = await self.loop.aside(lambda: catalog.point(asked.name, asked.version))
        return {"id": asked.name, "alias_of": f"{asked.name}@{asked.version}", "before": before}


def create_app(engine: Engine, options: ServerOptions, *, catalog: Catalog | None = None, keys: Keys | None = None) -> FastAPI:
    """engine: belongs to the app from its start to its end (lifespan). catalog: the engine's adapters; left out, only the base answers.
    The Service is `app.state.service`."""
    service = Service(engine, options, catalog, keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.watch.begin()
        service.loop.start()
        try:
            yield
        finally:
            await service.loop.stop(options.drain)
            service.encoder.shutdown(wait=False)

    app = FastAPI(title="Graftwork", summary="Many adapters on one base", lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses={"default": {"description": "What went wrong", "content": {"application/json": {"schema": SCHEMA}}}})
    app.state.service = service
    app.add_middleware(Edge, max_body=options.max_body, body_seconds=options.body_seconds,
                       answered=lambda route, status: service.metrics.answers.labels(route, str(status)).inc())
    for kind, handler in ((ApiError, _failed), (GraftworkError, _failed), (RequestValidationError, _invalid), (HTTPException, _refused)):
        app.add_exception_handler(kind, handler)
    _routes(app, service)
    if options.page:
        add_page(app)
    return app


def _routes(app: FastAPI, service: Service) -> None:
    key_of = Depends(service.key)

    @app.get("/v1/models", response_model=None)
    async def models(key=key_of) -> Response:
        return Json({"object": "list", "data": await asyncio.to_thread(service.models, key)})

    @app.get("/v1/models/{model}", response_model=None)
    async def model(model: str, key=key_of) -> Response:
        return Json(service.entry(model, service.adapter(model, key)))

    streamed = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", response_model=None, responses=streamed)
    async def completions(asked: CompletionRequest, request: Request, key=key_of) -> Response:
        return await service.answer(request, key, asked, asked.prompts, Form, 16)  # OpenAI's default

    @app.post("/v1/chat/completions", response_model=None, responses=streamed)
    async def chat(asked: ChatRequest, request: Request, key=key_of) -> Response:
        return await service.answer(request, key, asked, [asked.conversation], ChatForm, service.options.chat_tokens)

    @app.post("/v1/load_lora_adapter", response_model=None, response_class=PlainTextResponse)
    async def load(asked: LoadRequest, key=key_of) -> Response:
        return PlainTextResponse(await service.load(asked, key))

    @app.post("/v1/unload_lora_adapter", response_model=None, response_class=PlainTextResponse)
    async def unload(asked: UnloadRequest, key=key_of) -> Response:
        return PlainTextResponse(await service.unload(asked, key))

    @app.post("/v1/adapters/alias", response_model=None)
    async def alias(asked: AliasRequest, key=key_of) -> Response:
        return Json(await service.point(asked, key))

    @app.post("/tokenize", response_model=None)
    async def tokenize(asked: TokenizeRequest, key=key_of) -> Response:
        if asked.model is not None:
            service.adapter(asked.model, key)
        if asked.messages is not None:
            ids = await service.tokenized(encode_prompt, service.tokenizer, [m.model_dump(exclude_none=True) for m in asked.messages])
        elif asked.add_special_tokens is False:
            ids = await service.tokenized(lambda: service.tokenizer(asked.prompt, add_special_tokens=False, verbose=False)["input_ids"])
        else:
            ids = await service.tokenized(encode_prompt, service.tokenizer, asked.prompt) if asked.prompt else []
        return Json({"tokens": ids, "count": len(ids), "max_model_len": service.engine.context})

    @app.post("/detokenize", response_model=None)
    async def detokenize(asked: DetokenizeRequest, key=key_of) -> Response:
        if asked.model is not None:
            service.adapter(asked.model, key)
        wrong = [token for token in asked.tokens if not 0 <= token < service.inputs]
        if wrong:
            raise ApiError(400, f"tokens: there is no token {wrong[0]}; tokens are 0 to {service.inputs - 1}", param="tokens")
        return Json({"prompt": await service.tokenized(service.tokenizer.decode, asked.tokens)})

    @app.get("/v1/status", response_model=None)
    async def status(key=key_of) -> Response:
        return Json(await asyncio.to_thread(show, *await service.watch.snapshot(), service.options.model, key))

    not_now = {503: {"description": "Not now", "content": {"application/json": {}}}}

    @app.get("/health", response_model=None, responses=not_now)
    async def health() -> Response:
        failed = service.loop.failed
        if failed is None:
            return Json({"status": "ok"})
        return Json({"status": "failed", "error": type(failed).__name__}, status_code=503)

    @app.get("/ready", response_model=None, responses=not_now)
    async def ready() -> Response:
        return Json({"status": "ready" if service.loop.ready else "not ready"}, status_code=200 if service.loop.ready else 503)

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    async def metrics() -> Response:
        try:  # between two steps, as adapters come and go in them
            service.metrics.beside.set(await service.loop.call(service.engine.bytes_beside))
        except Unavailable:  # the last figure stays
            pass
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# -- errors -------------------------------------------------------------------------------------------------------------------------
async def _failed(request: Request, error: Exception) -> Response:
    found = api_error(error)
    return Json(found.body(), status_code=found.status, headers=found.headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    found = ApiError(error.status_code, str(error.detail), code=CODES.get(error.status_code, "invalid_request"), headers=error.headers)
    return Json(found.body(), status_code=found.status, headers=found.headers)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """Fields that are wrong, missing or not known: 400 with the first one as `param`."""
    texts, param = [], None
    for each in error.errors():
        path = [str(part) for part in each["loc"] if part != "body"]
        text = each["msg"].removeprefix("Value error, ")
        if each["type"] == "json_invalid":
            text, path = f"the body is no JSON: {each['ctx']['error']}", []
        elif each["type"] == "extra_forbidden":
            text = "this field is not known or not supported; nothing is ignored silently"
        param = param or (path[0] if path else None)
        texts.append(f"{'.'.join(path)}: {text}" if path else text)
    found = ApiError(400, "; ".join(texts[:4])[:2000], param=param, code="invalid_request")
    return Json(found.body(), status_code=400)
