"""OFT: rotations leave the angles between neurons, and so their hyperspherical energy, as they are."""

CLAIM = {
    "system": "OFT",
    "statement": "preserves the hyperspherical energy of the neurons, which other tuning changes",
    "number": "exact",
    "source": "arXiv 2306.07280",
    "kind": "exactness",
    "setting": "random rotations of blocks of 16 on a small Llama's seven maps in float64: sum of 1 / |w_i - w_j| over the rows "
               "of each tuned weight, scaled to length one, against that of the base; a LoRA whose change is as large beside it",
    "baseline": "lora",
    "holds": "oft.energy <= 1e-9 and oft.moved >= 0.05 and lora.energy >= 1000000 * oft.energy",
    "refuted_by": "another energy",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import graftwork
    from graftwork.claims import probes

    found, moved = {}, None
    for arm, options in (("oft", {"block_size": 16}), ("lora", {"r": 4})):
        graft = graftwork.attach(probes.model(seed), arm, target_modules="all-linear", seed=seed, **options)
        graft.model.double()
        probes.scatter(graft, seed, 0.05)
        energies, sizes = [], []
        for site, change in zip(graft.sites.values(), probes.changes(graft), strict=True):
            W = site.product.dense().detach().double()
            if arm == "lora":  # as large as the rotation's
                change = change * moved[len(sizes)] * W.norm() / change.norm()
            sizes.append(float(change.norm() / W.norm()))
            energies.append(abs(_energy(W + change) / _energy(W) - 1))
        moved = moved or sizes
        found[arm] = {"energy": max(energies), "moved": min(sizes)}
    return found


def _energy(W) -> float:
    """Sum over pairs of rows, scaled to length one, of one over their distance."""
    import torch

    return float((1 / torch.nn.functional.pdist(torch.nn.functional.normalize(W, dim=1))).sum())
