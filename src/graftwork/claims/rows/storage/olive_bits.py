"""OliVe: outliers take the code of a neighbor, so that nothing beside the 4-bit codes and a scale is stored."""

CLAIM = {
    "system": "OliVe",
    "statement": "4.5x the speed and 4.0x the energy efficiency of GOBO",
    "number": "4.5x",
    "source": "arXiv 2304.07493",
    "headline": "no accelerator",
    "kind": "exactness",
    "setting": "heavy-tailed 64 x 256 weights (t with 3 degrees of freedom): bytes of the codes, at most one "
               "outlier a pair, its neighbor 0, and the codes of decoded weights",
    "baseline": "int4",
    "holds": "olive.bits == 4 and olive.twice == 0 and olive.neighbors == 0 and olive.error < int4.error",
    "refuted_by": "bytes beside the codes and scales",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:

    from graftwork.claims import probes

    W = probes.normal(seed, 64, 256) / (sum(probes.normal(seed + k, 64, 256).square() for k in (100, 200, 300)) / 3).sqrt()
    kept = probes.stored(W, "olive")
    dense, scale = kept.dequantize().float(), kept.leaves()["scale"].float().view(64, 1)
    outlier = (dense.abs() > 8 * scale).view(64, -1, 2)  # beyond the normal codes
    pairs = dense.view(64, -1, 2)
    neighbors = (pairs[outlier.any(-1)].abs().amin(-1) > 0).sum()
    bits = 8 * kept.leaves()["codes"].numel() / W.numel()
    absmax = W.abs().amax(1, keepdim=True)
    plain = (W / absmax * 7).round() / 7 * absmax
    return {"olive": {"bits": bits, "twice": int(outlier.all(-1).sum()), "neighbors": int(neighbors), "error": probes.relative(dense, W)},
            "int4": {"error": probes.relative(plain, W)}}
