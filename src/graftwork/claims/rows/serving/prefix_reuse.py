"""SGLang (RadixAttention): prompts that begin alike under one adapter are read once."""

CLAIM = {
    "system": "SGLang (RadixAttention)",
    "statement": "sharing caches of common prefixes gives up to 6.4x throughput",
    "number": "6.4x",
    "source": "arXiv 2312.07104",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, 3 LoRA adapters r=8 on q and v, 24 requests with 192 tokens in common and 8 of their"
               " own, answers of 8 tokens; with and without the prefix cache, tokens a second of processor time; answers of both"
               " are compared",
    "baseline": "none",
    "holds": "cached.rate >= 2 * none.rate and max(cached.different, 0) == 0",
    "refuted_by": "no higher rate, or another answer",
    "minutes": 6,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims import serving_runs as serving

    model, tokenizer = serving.base(quick)
    start = serving.prompts(model, [192], seed + 50)[0]
    ids = [[*start, *own] for own in serving.prompts(model, [8] * 24, seed)]
    names = [f"a{i % 3}" for i in range(24)]
    runs = {arm: serving.Run(serving.with_grafts(model, 3, r=8, target_modules=["q_proj", "v_proj"]), tokenizer, ids, names, 8, running=6,
                             prefix_cache=arm == "cached") for arm in ("none", "cached")}
    done = serving.race(runs)
    found = {arm: {"rate": run.written / sum(run.seconds)} for arm, run in done.items()}
    found["cached"]["different"] = sum(a.output != b.output for a, b in zip(done["cached"].requests, done["none"].requests))
    return found
