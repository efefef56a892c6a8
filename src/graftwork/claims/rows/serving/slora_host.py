"""S-LoRA: more adapters than the device has room for, kept on the host and fetched for those that run."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "all adapters stay in main memory and only those of running requests lie on the device, whose memory bounds how "
                 "many run and not how many are served",
    "source": "arXiv 2311.03285",
    "kind": "exactness",
    "setting": "small Llama, 24 LoRA adapters of ranks 8 to 64 on disk, two requests of each in shuffled order at most 4 at "
               "once; a pool with room for about four adapters, and one with room for all; pages used at most, files read, "
               "tokens written",
    "baseline": "roomy",
    "holds": "tight.used <= tight.pages and tight.pages < tight.adapters and tight.loads > 24 and tight.reads == 24 and "
             "tight.different == 0 and roomy.loads == 24",
    "refuted_by": "a pool that grows, a file that is read twice, or another answer",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import tempfile
    from pathlib import Path

    import torch

    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine.adapters import AdapterFolder

    model, tokenizer = serving.base(quick=True)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(seed)).tolist()
    names, ids = [f"a{i % 24}" for i in order], serving.prompts(model, [10] * 48, seed)
    with tempfile.TemporaryDirectory() as place:
        ranks = {k: (8, 16, 32, 64)[k % 4] for k in range(24)}
        serving.write_adapters(model, Path(place), ranks, target_modules="all-linear")
        found, outputs = {}, {}
        for arm, pool in (("roomy", 64 << 20), ("tight", 4 << 20)):
            own = serving.twin(model)
            source = AdapterFolder(own, place)
            run = serving.Run(own, tokenizer, ids, names, 8, running=4, adapters=source, pool=pool)
            memory, used = run.engine.memory, 0
            wanted = sum(memory.packing(source.digest(f"a{k}")).pages for k in range(24))
            while run.busy:
                run.step()
                used = max(used, memory.pool.used)
            outputs[arm] = [tuple(r.output) for r in run.requests]
            found[arm] = {"used": used, "pages": memory.pool.pages, "adapters": wanted, "loads": memory.loads, "reads": source.reads}
            run.finish()
    found["tight"]["different"] = sum(a != b for a, b in zip(outputs["tight"], outputs["roomy"]))
    return found
