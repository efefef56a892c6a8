"""S-LoRA: adapters of unequal ranks, each at its own rank, against products padded to the largest."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "kernels for unequal ranks pay: 1.58 requests a second, 0.25 with products padded to the largest rank",
    "number": "6.3x",
    "source": "arXiv 2311.03285",
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, 32 rows on 32 adapters of ranks 8, 16, 32 and 64 on q and v, requests that come and "
               "go (answers of 4 to 24 tokens); both sides take the same steps, by turns; tokens a second of processor time",
    "baseline": "padded",
    "holds": "padded.rate <= 0.5 * engine.rate and padded.rate < engine.rate",
    "refuted_by": "padded products as fast",
    "minutes": 8,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.adapters import base as adapters
    from graftwork.adapters import row_groups
    from graftwork.adapters.batched import gathered
    from graftwork.claims import serving_runs as serving

    model, tokenizer = serving.base(quick)
    rows = 8 if quick else 32

    def grafts():
        own = serving.twin(model)
        for k in range(rows):
            r = (8, 16, 32, 64)[k % 4]
            serving.fill(graftwork.attach(own, "lora", name=f"a{k}", r=r, alpha=r, target_modules=["q_proj", "v_proj"], seed=k), k)
        return own

    draw = torch.Generator().manual_seed(seed)
    answers = torch.randint(4, 25, (3 * rows,), generator=draw).tolist()[:rows if quick else 3 * rows]
    ids, names = serving.prompts(model, [8] * len(answers), seed), [f"a{i % rows}" for i in range(len(answers))]
    ours, padded = (serving.Run(grafts(), tokenizer, ids, names, answers, running=rows) for _ in range(2))
    kernel, settled = adapters.change_of_rows, row_groups.Group.pairs
    while ours.busy:
        ours.step()
        adapters.change_of_rows = lambda x, index, bank: gathered(x, index, bank)  # factors of every row, padded with zeros
        row_groups.Group.pairs = lambda self, x, y: None
        try:
            padded.step()
        finally:
            adapters.change_of_rows, row_groups.Group.pairs = kernel, settled
    return {name: {"rate": run.written / sum(run.seconds)} for name, run in (("engine", ours.finish()), ("padded", padded.finish()))}
