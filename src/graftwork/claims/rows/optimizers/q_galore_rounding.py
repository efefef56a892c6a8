"""Q-GaLore: stochastic rounding keeps updates that are smaller than half a code."""

CLAIM = {
    "system": "Q-GaLore",
    "statement": "stochastic rounding keeps small updates of INT8 weights",
    "number": "5 steps of a code",
    "source": "arXiv 2407.08296",
    "kind": "exactness",
    "setting": "INT8 weights 64 x 256, 100 updates of 0.05 codes each, whose sum is 5 codes; rounding to the "
               "nearest beside it",
    "baseline": "nearest",
    "holds": "nearest.moved == 0 and abs(stochastic.moved - 5) <= 0.1",
    "refuted_by": "no difference",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims import probes

    start, found = probes.normal(seed, 64, 256).clamp(-2, 2), {}
    start[:, 0], start[:, -1] = -4.0, 4.0  # so that no update changes the scale of a row
    for arm, own in (("nearest", None), ("stochastic", torch.Generator().manual_seed(seed + 1))):
        kept = probes.stored(start, "int8")
        for _ in range(2):
            kept.write(kept.read())
        first, step = kept.read(), 0.05 * kept.leaves()["scale"].mean()
        for _ in range(100):
            values = kept.read()
            values[:, 1:-1] += step
            kept.write(values, own)
        found[arm] = {"moved": ((kept.read() - first)[:, 1:-1] / step * 0.05).mean().item()}
    return found
