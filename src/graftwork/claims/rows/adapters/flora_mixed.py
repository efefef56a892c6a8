"""FLoRA: each row of a batch has its own adapter, and learns what it would learn alone."""

CLAIM = {
    "system": "FLoRA (batched)",
    "statement": "each example of a batch has its own adapter, in one forward pass",
    "number": "exact",
    "source": "arXiv 2312.05677",
    "kind": "exactness",
    "setting": "4 adapters of rank 2 with random values on a small Llama in float64: logits and gradients of a mixed batch against those "
               "of each row alone; a batch in which the rows are given the wrong adapters beside it",
    "baseline": "wrong",
    "holds": "mixed.output_error <= 1e-8 and mixed.slope_error <= 1e-8 and wrong.output_error >= 0.001",
    "refuted_by": "gradients of a mixed batch that differ from separate ones",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.adapters.routing import routing
    from graftwork.claims import probes

    model, names = probes.model(seed, double=True), ["a", "b", "c", "d"]
    grafts = {}
    for i, name in enumerate(names):
        grafts[name] = graftwork.attach(model, "flora", name=name, r=2, seed=seed)
        for adapter in grafts[name].adapters.values():
            adapter.double()
        draw = torch.Generator().manual_seed(10 * seed + i)
        for parameter in grafts[name].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    ids = next(probes.batches(1, seed, 4))["input_ids"]

    def run(rows, own):
        with routing(model, own):
            logits = model(rows).logits
        logits.square().sum().backward()
        gradients = {name: [p.grad.clone() for p in grafts[name].parameters()] for name in own}
        for graft in grafts.values():
            for p in graft.parameters():
                p.grad = None
        return logits.detach(), gradients

    together, learned = run(ids, names)
    turned, _ = run(ids, names[1:] + names[:1])
    worst = slope = wrong = 0.0
    for i, name in enumerate(names):
        alone, own = run(ids[i:i + 1], [name])
        worst = max(worst, float((together[i] - alone[0]).abs().max()))
        wrong = max(wrong, float((turned[i] - alone[0]).abs().max()))
        slope = max(slope, *(float((a - b).abs().max()) for a, b in zip(learned[name], own[name])))
    return {"mixed": {"output_error": worst, "slope_error": slope}, "wrong": {"output_error": wrong}}
