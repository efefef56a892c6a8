"""S-LoRA: one pool of pages for caches and adapters against fixed shares of it."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "unified paging pays: 1.58 requests a second against 1.19 with memory split between caches and adapters (n=200)",
    "number": "1.33x",
    "source": "arXiv 2311.03285",
    "kind": "serving",
    "setting": "the engine's own scheduler and page accounting on a virtual clock with the constants of SmolLM2-135M in fp32; "
               "100 adapters of ranks 8 to 64, 400 requests (prompts and answers of 8 to 256 tokens) at most 32 at once, 256 MiB"
               " in all; adapters have a quarter, a half or three quarters of the pages; the best of the three counts",
    "baseline": "split",
    "check": {"seeds": 5},
    "holds": "pool.rate > split.rate and pool.rate >= 1.05 * split.rate",
    "refuted_by": "a fixed share that is as fast",
    "minutes": 3,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims import serving_runs as serving
    from graftwork.serving import simulate as server
    from graftwork.serving.engine import Limits
    from graftwork.serving.workload import trace

    traffic = trace(adapters=100, rate=1.0, duration=60.0 if quick else 400.0, prompt=(8, 257), answer=(8, 257), seed=42 + seed).at_once()
    machine, limits, unified = serving.machine(256 << 20), Limits(max_running=32), server.Memory
    rates = {"pool": server.simulate(traffic, machine, limits=limits).metrics.tokens_per_second}
    try:
        for share in (0.25, 0.5, 0.75):
            server.Memory = split(unified, share)
            rates[share] = server.simulate(traffic, machine, limits=limits).metrics.tokens_per_second
    finally:
        server.Memory = unified
    return {"pool": {"rate": rates.pop("pool")}, "split": {"rate": max(rates.values()), "share": max(rates, key=rates.get)}}


def split(unified, share: float):
    """A memory in which adapters have a fixed part of the pages and caches the rest."""

    class Split(unified):
        def capacity(self):
            return self.pool.pages - int(self.pool.pages * share)

        def available(self):
            return self.capacity() - (self.pool.used - self.resident_pages)

        def adapter_pages(self, request):
            return 0

        def resident(self, digest):
            if digest not in self.residents:
                need, own = self.packing(digest).pages, int(self.pool.pages * share)
                for other in [d for d, r in self.residents.items() if not r.users]:
                    if self.resident_pages + need <= own:
                        break
                    self.drop(other)
                if self.resident_pages + need > own:
                    return None
            return super().resident(digest)

        def reserve(self, request, tokens):
            missing = self.pool.pages_for(request.computed + tokens) - len(request.pages)
            return missing <= max(0, self.available()) and super().reserve(request, tokens)

    return Split
