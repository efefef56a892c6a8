"""FLoRA (batched): every example of a minibatch has its own adapter, in training and in serving."""

CLAIM = {
    "system": "FLoRA (batched)",
    "statement": "each example in a minibatch has its own low-rank adapter",
    "source": "arXiv 2312.05677",
    "kind": "exactness",
    "setting": "small Llama in fp64, 6 rows on 6 FLoRA adapters of ranks 1 to 3 in one batch; losses by row and gradients of "
               "every adapter against six batches of one row; the same for a batch of FLoRA, LoRA, LoHa, DoRA, IA3 and VeRA rows",
    "baseline": "alone",
    "holds": "flora.difference <= 1e-10 and mixed.difference <= 1e-10 and alone.gradient > 1e-6",
    "refuted_by": "gradients of a mixed batch that are not those of separate ones",
    "minutes": 1,
}

KINDS = {"flora": [("flora", {"r": 1 + k % 3}) for k in range(6)],
         "mixed": [("flora", {"r": 2}), ("lora", {"r": 4}), ("loha", {"r": 2}), ("dora", {"r": 2}), ("ia3", {}), ("vera", {"r": 8})]}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found, size = {}, 0.0
    ids = next(probes.batches(1, seed, rows=6))["input_ids"]
    for arm, kinds in KINDS.items():
        model = probes.model(seed, double=True)
        grafts = [graftwork.attach(model, method, name=f"a{k}", seed=k, **options) for k, (method, options) in enumerate(kinds)]
        for k, graft in enumerate(grafts):
            draw = torch.Generator().manual_seed(10 * seed + k)
            for p in graft.parameters():
                p.data += 0.05 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)

        names = [g.name for g in grafts]
        together = losses(model, ids, names)
        whole = gradients(grafts, together.sum())
        apart = [losses(model, ids[i:i + 1], names[i:i + 1]) for i in range(6)]
        summed = sum(gradients(grafts, loss.sum()) for loss in apart)
        size = max(size, float(summed.abs().max()))
        found[arm] = {"difference": max(float((together - torch.cat(apart)).detach().abs().max()),
                                        float((whole - summed).abs().max() / summed.abs().max()))}
    return {**found, "alone": {"gradient": size}}


def losses(model, rows, names):
    """The loss of each row under its adapter."""
    import torch.nn.functional as F

    import graftwork

    with graftwork.routing(model, names):
        logits = model(rows).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


def gradients(grafts, loss):
    """Gradients of all adapters as one vector; zeros for those without a row."""
    import torch

    parameters = [p for g in grafts for p in g.parameters()]
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))])
