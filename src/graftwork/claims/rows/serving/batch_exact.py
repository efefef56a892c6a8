"""S-LoRA: a batch of different adapters answers as each adapter alone."""

CLAIM = {
    "system": "S-LoRA",
    "statement": "requests of different adapters, of any ranks, share one batch, and each gets what its own adapter computes",
    "source": "arXiv 2311.03285",
    "kind": "exactness",
    "setting": "small Llama, 24 prompts on 12 LoRA adapters of ranks 1 to 64 and on the bare base in one engine, prompts in "
               "pieces; logits of every written token against the model with that adapter alone, in Transformers; the least "
               "difference to a neighbor's adapter",
    "baseline": "neighbor",
    "holds": "batch.difference <= 1e-4 and neighbor.difference >= 0.01",
    "refuted_by": "logits of another adapter, or none",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    ranks = (1, 2, 4, 8, 16, 64)
    return mixed(seed, [("lora", {"r": ranks[k % 6], "target_modules": "all-linear"}) for k in range(12)])


def mixed(seed: int, kinds: list, rows: int = 24) -> dict:
    """Largest relative differences of a batch's logits: to those of the own adapter, and (least over the rows) to the next one's."""
    import torch

    import graftwork
    from graftwork.claims import serving_runs as serving
    from graftwork.serving.engine import engine as engines

    model, tokenizer = serving.base(quick=True)
    own = serving.twin(model)
    for k, (method, options) in enumerate(kinds):
        serving.fill(graftwork.attach(own, method, name=f"a{k}", seed=seed + k, **options), 100 * seed + k, 0.1)
    names = [None if i % 12 == 11 else f"a{i % len(kinds)}" for i in range(rows)]
    ids = serving.prompts(model, [5 + i % 9 for i in range(rows)], seed)
    heard: dict[str, list] = {}
    choose = engines.choose

    def listening(logits, requests, *rest):
        for row, request in zip(logits, requests):
            heard.setdefault(request.id, []).append(row.clone())
        return choose(logits, requests, *rest)

    engines.choose = listening
    try:
        run = serving.Run(own, tokenizer, ids, names, 5).finish()
    finally:
        engines.choose = choose

    def alone(row, request, name):
        tokens = torch.tensor([[*row, *request.output]])
        with torch.no_grad(), graftwork.routing(own, [name]):
            return own(tokens).logits[0, len(row) - 1: -1]

    worst, apart = 0.0, 1e9
    for i, (row, name, request) in enumerate(zip(ids, names, run.requests)):
        got, wanted = torch.stack(heard[f"{i}"]), alone(row, request, name)
        other = alone(row, request, f"a{(i + 1) % len(kinds)}")
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
        apart = min(apart, float((got - other).abs().max() / wanted.abs().max()))
    return {"batch": {"difference": worst}, "neighbor": {"difference": apart}}
