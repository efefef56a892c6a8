"""LoKr: the rank of a Kronecker product is the product of the ranks."""

CLAIM = {
    "system": "LoKr (LyCORIS)",
    "statement": "a Kronecker product reaches ranks far above those of a LoRA with as many numbers, as ranks multiply",
    "number": "rank(W1) rank(W2)",
    "source": "arXiv 2309.14859",
    "kind": "exactness",
    "setting": "r=2 with random factors on a small Llama's seven maps; ranks of the changes in float64 that the outputs on "
               "the unit inputs are read from; LoRA of rank 1, which has more numbers",
    "baseline": "lora",
    "holds": "lokr.missing == 0 and lokr.least >= 8 and lokr.trained <= lora.trained and lora.greatest <= 1",
    "refuted_by": "a rank that is not the product",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found = {}
    for arm, r in (("lokr", 2), ("lora", 1)):
        graft = graftwork.attach(probes.model(seed), arm, r=r, target_modules="all-linear", seed=seed)
        graft.model.double()
        probes.scatter(graft, seed, 1.0)
        ranks = [int(torch.linalg.matrix_rank(change)) for change in probes.changes(graft)]
        found[arm] = {"least": min(ranks), "greatest": max(ranks), "trained": sum(p.numel() for p in graft.parameters())}
        if arm == "lokr":
            wanted = [_rank(adapter) for adapter in graft.adapters.values()]
            found[arm]["missing"] = sum(abs(own - rank) for own, rank in zip(wanted, ranks, strict=True))
    return found


def _rank(adapter) -> int:
    """By the definition: rank of W1 times rank of W2, which is W2a W2b where it has two factors."""
    import torch

    parts = {name: p.detach() for name, p in adapter.named_parameters()}
    second = parts["W2"] if "W2" in parts else parts["W2a"] @ parts["W2b"]
    return int(torch.linalg.matrix_rank(parts["W1"])) * int(torch.linalg.matrix_rank(second))
