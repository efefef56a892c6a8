"""dLoRA: changing between merged and unmerged weights by what is asked for."""

CLAIM = {
    "system": "dLoRA",
    "statement": "switching between merged and unmerged serving lowers latency where few adapters get most requests (1.8x below "
                 "S-LoRA on average), and loses nothing where requests are spread",
    "number": "1.8x",
    "source": "OSDI 2024, Wu et al.",
    "kind": "serving",
    "setting": "the engine's own scheduler and merging rule on a virtual clock with the constants of SmolLM2-135M in fp32, 0.3 s"
               " a switch; 20 adapters, 1.2 times the unmerged capacity for 200 s; requests nearly all for one adapter, and "
               "uniform; mean seconds of an answer",
    "baseline": "unmerged",
    "check": {"seeds": 5},
    "holds": "switching.skewed < unmerged.skewed and switching.spread <= 1.02 * unmerged.spread",
    "refuted_by": "no lower latency with skewed requests",
    "minutes": 3,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine import Limits
    from graftwork.serving.engine.merging import Merging
    from graftwork.serving.simulate import simulate
    from graftwork.serving.workload import trace

    machine, limits, lengths = serving.machine(switch=0.3), Limits(max_running=32), {"prompt": (8, 65), "answer": (8, 65)}
    full = trace(adapters=20, rate=1.0, duration=100.0 if quick else 300.0, **lengths).at_once()
    capacity = simulate(full, machine, limits=limits).metrics.throughput
    found: dict[str, dict[str, float]] = {"switching": {}, "unmerged": {}}
    for name, alpha in (("skewed", 0.02), ("spread", 1.0)):
        traffic = trace(adapters=20, rate=1.2 * capacity, duration=60.0 if quick else 200.0, alpha=alpha, seed=42 + seed, **lengths)
        found["switching"][name] = simulate(traffic, machine, limits=limits, merging=Merging()).metrics.latency
        found["unmerged"][name] = simulate(traffic, machine, limits=limits).metrics.latency
    return found
