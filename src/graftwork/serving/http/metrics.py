"""What Prometheus reads at /metrics, in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine import Request
from ..engine.request import Sum
from .loop import EngineLoop

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SUMS = "(sum)"  # the label of requests for several adapters; no adapter has this name
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """base: the label of requests without adapter. Labels are names that exist, so a client cannot make new ones."""

    def __init__(self, loop: EngineLoop, base: str):
        self.base, self.registry = base, CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("graftwork_requests", "Requests that have ended, by adapter and reason (stop, length, abort, error)",
                                ["adapter", "reason"], **own)
        self.prompt = Counter("graftwork_prompt_tokens", "Prompt tokens of requests that have ended", ["adapter"], **own)
        self.cached = Counter("graftwork_cached_prompt_tokens", "Of those, tokens whose keys and values were there already",
                              ["adapter"], **own)
        self.written = Counter("graftwork_generated_tokens", "Tokens written", ["adapter"], **own)
        self.answers = Counter("graftwork_http_responses", "HTTP responses, by route and status", ["route", "status"], **own)
        self.first = Histogram("graftwork_time_to_first_token_seconds", "From arrival to the first token", buckets=FIRST, **own)
        self.token = Histogram("graftwork_time_per_output_token_seconds", "Mean time between the tokens of a request", buckets=TOKEN, **own)
        self.whole = Histogram("graftwork_request_seconds", "From arrival to the end", buckets=WHOLE, **own)
        self.beside = Gauge("graftwork_adapter_bytes_beside_pool", "Bytes of adapters in use that do not lie in the pool", **own)
        engine = loop.engine
        gauges = {
            "graftwork_requests_running": ("Requests in the batch", lambda: len(engine.scheduler.running)),
            "graftwork_requests_waiting": ("Requests in the queue", lambda: loop.waiting),
            "graftwork_pool_pages": ("Pages of the pool", lambda: engine.pool.pages),
            "graftwork_pool_pages_used": ("Pages in use: requests, prefixes and adapters", lambda: engine.pool.used),
            "graftwork_pool_pages_idle": ("Of those in use, pages of prefixes and adapters that no request runs on",
                                          lambda: engine.memory.available() - engine.pool.free),
            "graftwork_pool_bytes": ("Bytes of the pool", lambda: engine.pool.nbytes),
            "graftwork_adapters_resident": ("Adapters in the pool", lambda: len(engine.memory.residents)),
            "graftwork_adapter_loads": ("Adapters put into the pool so far", lambda: engine.memory.loads),
            "graftwork_adapter_evictions": ("Adapters taken out of the pool so far", lambda: engine.memory.evictions),
            "graftwork_merged_bytes": ("Bytes of weights that an adapter is merged into, beside the pool", lambda: engine.merged_bytes()),
            "graftwork_merged_steps": ("Steps with merged weights so far", lambda: engine.merging.steps if engine.merging else 0),
            "graftwork_engine_steps": ("Steps so far", lambda: engine.steps),
            "graftwork_engine_up": ("1 while the engine works", lambda: int(loop.failed is None)),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, **own).set_function(value)

    def ended(self, request: Request, name: str | Sum | None) -> None:
        adapter = self.base if name is None else name if isinstance(name, str) else SUMS
        self.requests.labels(adapter, request.finish_reason).inc()
        self.prompt.labels(adapter).inc(len(request.prompt))
        self.cached.labels(adapter).inc(min(request.cached, len(request.prompt)))
        self.written.labels(adapter).inc(len(request.output))
        if request.first_token is not None:
            self.first.observe(max(request.first_token - request.arrived, 0.0))
            if request.ended is not None:
                self.whole.observe(max(request.ended - request.arrived, 0.0))
                if len(request.output) > 1:
                    self.token.observe((request.ended - request.first_token) / (len(request.output) - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
