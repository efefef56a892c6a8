"""QLoRA: NF4 against other codes of 16 values, and against the best one by Lloyd's algorithm."""

CLAIM = {
    "system": "QLoRA",
    "statement": "NF4 is information-theoretically optimal for normally distributed weights",
    "number": "optimal",
    "source": "arXiv 2305.14314",
    "kind": "exactness",
    "setting": "Gaussian 512 x 2048, blocks of 64, relative error; FP4, symmetric INT4 by the largest value, "
               "INT4 from least to largest, and a code of 16 values fitted to the scaled weights (Lloyd)",
    "baseline": "lloyd",
    "check": {"seeds": 2},
    "holds": "nf4.error <= fp4.error and nf4.error <= absmax.error and nf4.error <= minmax.error and "
             "nf4.error <= lloyd.error",
    "refuted_by": "a code of 16 values, or INT4 at its own bits, with a lower error",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims import probes

    W = probes.normal(seed, 512, 2048)
    groups = W.view(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    units = groups / scale
    codes = torch.linspace(-1, 1, 16)
    for _ in range(60):  # Lloyd: nearest code, then the mean of its values
        nearest = torch.bucketize(units, (codes[1:] + codes[:-1]) / 2)
        sums = torch.zeros(16).index_add_(0, nearest.flatten(), units.flatten())
        codes = sums / torch.bincount(nearest.flatten(), minlength=16).clamp(min=1)
    lloyd = codes[torch.bucketize(units, (codes[1:] + codes[:-1]) / 2)] * scale
    absmax = (units * 7).round() / 7 * scale
    kept = {"nf4": probes.stored(W, "nf4").dequantize(), "fp4": probes.stored(W, "fp4", book="bnb").dequantize(),
            "minmax": probes.stored(W, "int4").dequantize(), "absmax": absmax.view_as(W), "lloyd": lloyd.view_as(W)}
    return {arm: {"error": probes.relative(found.float(), W)} for arm, found in kept.items()}
