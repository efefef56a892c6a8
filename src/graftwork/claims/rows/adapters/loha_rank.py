"""LoHa: the product of two changes of rank r, element by element, reaches rank r^2."""

CLAIM = {
    "system": "LoHa (FedPara)",
    "statement": "2 r (in + out) numbers reach rank r^2, where a low-rank product of as many reaches 2 r",
    "number": "r^2",
    "source": "arXiv 2108.06098",
    "kind": "exactness",
    "setting": "r=4 with random factors on a small Llama's seven maps, LoRA of r=8 with as many; ranks of the changes in "
               "float64 that the outputs on the unit inputs are read from",
    "baseline": "lora",
    "holds": "loha.least == 16 and lora.greatest <= 8 and loha.trained == lora.trained",
    "refuted_by": "a rank below r^2",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found = {}
    for arm, r in (("loha", 4), ("lora", 8)):
        graft = graftwork.attach(probes.model(seed), arm, r=r, target_modules="all-linear", seed=seed)
        graft.model.double()
        probes.scatter(graft, seed, 1.0)
        ranks = [int(torch.linalg.matrix_rank(change)) for change in probes.changes(graft)]
        found[arm] = {"least": min(ranks), "greatest": max(ranks), "trained": sum(p.numel() for p in graft.parameters())}
    return found
