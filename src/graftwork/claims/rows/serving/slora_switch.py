"""S-LoRA: computing adapters beside the base against merging one after the other."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "merging and switching adapters serves 0.25 requests a second where computing them beside the base serves 8 "
                 "(n=100); merging wins with few adapters only",
    "number": "32x",
    "source": "arXiv 2311.03285",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, LoRA r=8 on q and v, 16 requests of 2 and of 16 adapters (prompts of 16, answers of "
               "16 tokens); merged in place, all requests of one adapter at once, then the next; tokens a second of processor "
               "time",
    "baseline": "switch",
    "holds": "beside.rate16 >= 2 * switch.rate16 and beside.rate16 / switch.rate16 > beside.rate2 / switch.rate2",
    "refuted_by": "switching as fast with 16 adapters",
    "minutes": 10,
}


def measure(seed: int, quick: bool) -> dict:
    import time

    import torch

    import graftwork
    from graftwork.claims import serving_runs as serving

    model, tokenizer = serving.base(quick)
    new, options = (4 if quick else 16), {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    ids = serving.prompts(model, [16] * 16, seed + 1)
    found = {"beside": {}, "switch": {}}
    for count in (2, 16):
        names = [f"a{i % count}" for i in range(16)]
        run = serving.Run(serving.with_grafts(model, count, **options), tokenizer, ids, names, new).finish()
        found["beside"][f"rate{count}"] = run.written / sum(run.seconds)
        own, written, used = serving.twin(model), 0, 0.0
        for module in own.modules():  # merged in place: weights of its own
            if isinstance(module, torch.nn.Linear) and module is not own.get_output_embeddings():
                module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        for k in range(count):
            rows = [row for row, name in zip(ids, names) if name == f"a{k}"]
            graft = serving.fill(graftwork.attach(own, "lora", name=f"a{k}", seed=k, **options), k)
            start = time.process_time()
            graft.merge()
            used += time.process_time() - start
            part = serving.Run(own, tokenizer, rows, [None] * len(rows), new).finish()
            start = time.process_time()
            graft.unmerge()
            used += sum(part.seconds) + time.process_time() - start
            written += part.written
            graft.detach()
        found["switch"][f"rate{count}"] = written / used
    return found
