"""S-LoRA: throughput over the number of adapters that requests name."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "throughput stays nearly flat from 5 to 2,000 adapters",
    "number": "8.05 to 7.61 requests a second (0.945)",
    "source": "arXiv 2311.03285",
    "first": 11,
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, LoRA r=8 on q and v in main memory as published, 128 requests (prompts and answers "
               "of 8 to 32 tokens, adapters uniform) at most 32 at once; both sides take the same steps, by turns; tokens a "
               "second of processor time, their copies into the pool included",
    "baseline": "n5",
    "holds": "n2000.rate >= 0.9 * n5.rate",
    "refuted_by": "less than 0.8 of the rate with 5 adapters",
    "minutes": 20,
}


def measure(seed: int, quick: bool) -> dict:
    import statistics
    import tempfile
    from pathlib import Path

    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine.adapters import AdapterFolder
    from graftwork.serving.workload import trace

    model, tokenizer = serving.base(quick)
    with tempfile.TemporaryDirectory() as place:
        runs = {}
        for count in (5, 2000):
            traffic = trace(adapters=count, rate=1.0, duration=6.0 if quick else 128.0, prompt=(8, 33), answer=(8, 33), ranks=(8,),
                            seed=42 + seed)
            root = Path(place) / str(count)
            root.mkdir()
            asked = sorted(set(traffic.adapters.tolist()))
            serving.write_adapters(model, root, dict.fromkeys(asked, 8), target_modules=["q_proj", "v_proj"])
            own = serving.twin(model)
            source = AdapterFolder(own, root, host_bytes=1 << 32)
            for number in asked:
                source.host(source.digest(f"a{number}"))
            runs[f"n{count}"] = serving.Run(own, tokenizer, serving.prompts(model, traffic.prompts.tolist()),
                                            [f"a{k}" for k in traffic.adapters.tolist()], traffic.answers.tolist(), running=32,
                                            adapters=source)
        done = serving.race(runs)
    return {name: {"rate": run.written / sum(run.seconds), "step": statistics.median(run.seconds),
                   "distinct": len({r.adapter for r in run.requests})} for name, run in done.items()}
