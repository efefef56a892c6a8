"""S-LoRA: giving up hopeless requests early keeps the promised first tokens under overload."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "under overload early abort keeps more first tokens in time than newest first, and that more than first come "
                 "first served",
    "number": "0.86, 0.79, 0.27",
    "source": "arXiv 2311.03285",
    "kind": "serving",
    "setting": "the engine's own scheduler on a virtual clock with the constants of SmolLM2-135M in fp32; 200 adapters, 1.2 "
               "times the capacity for 300 s, 6 s to the first token; steady arrivals (cv 1) and bursts (cv 8), share of all "
               "requests in time",
    "baseline": "fcfs",
    "check": {"seeds": 5},
    "holds": "abort.bursts > newest.bursts and newest.bursts > fcfs.bursts and abort.steady > newest.steady and newest.steady "
             "> fcfs.steady",
    "refuted_by": "another order",
    "minutes": 4,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine import Limits
    from graftwork.serving.simulate import simulate
    from graftwork.serving.workload import trace

    machine, limits, lengths = serving.machine(), Limits(max_running=32), {"prompt": (8, 65), "answer": (8, 65)}
    duration = 60.0 if quick else 300.0
    full = trace(adapters=200, rate=1.0, duration=100.0 if quick else 400.0, **lengths).at_once()
    capacity = simulate(full, machine, limits=limits).metrics.throughput
    found: dict[str, dict[str, float]] = {}
    for name, cv in (("steady", 1.0), ("bursts", 8.0)):
        traffic = trace(adapters=200, rate=1.2 * capacity, duration=duration, cv=cv, seed=42 + seed, **lengths)
        for arm, policy in (("abort", "early_abort"), ("newest", "newest"), ("fcfs", "fcfs")):
            found.setdefault(arm, {})[name] = simulate(traffic, machine, policy=policy, limits=limits, slo=6.0).metrics.attainment
    return found
