"""SVDQuant: what 4-bit codes and a 16-bit branch of rank 32 take together."""

CLAIM = {
    "system": "SVDQuant",
    "statement": "3.5x less memory for FLUX.1 (12B), and 3.0x the speed",
    "number": "3.5x",
    "source": "arXiv 2411.05007",
    "headline": "no fused GPU kernels for the speed, no FLUX.1",
    "kind": "parameter_count",
    "check": {"seeds": 1},
    "setting": "a matrix of 3072 x 3072, the width of FLUX.1: symmetric 4-bit codes in groups of 64, a branch of rank 32, all stored "
               "bytes; codes alone beside it",
    "baseline": "int4",
    "holds": "3.4 * svdquant.bits <= 16 and 16 <= 3.6 * svdquant.bits and int4.bits < svdquant.bits",
    "refuted_by": "a ratio outside 3.4 to 3.6",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims import probes

    weight = torch.empty(3072, 3072, dtype=torch.bfloat16, device="meta")
    base = {"method": "int4", "group_size": 64, "symmetric": True}
    return {"svdquant": {"bits": probes.stored(weight, "lowrank_plus", base=base, r=32).bits_per_weight},
            "int4": {"bits": probes.stored(weight, "int4", group_size=64, symmetric=True).bits_per_weight}}
