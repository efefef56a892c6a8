"""PiSSA: quantizing the residual of the principal part loses less than quantizing the weight."""

CLAIM = {
    "system": "PiSSA",
    "statement": "quantizing the residual cuts the 4-bit error by 18.97 % (LLaMA-2-7B)",
    "number": "18.97 %",
    "source": "arXiv 2404.02948",
    "kind": "exactness",
    "setting": "NF4 in blocks of 64, three weights of SmolLM2-135M (which was in 4 bits of groups of 32 "
               "before), r=16 and 128; norm of W - (Q + BA) against NF4 alone",
    "baseline": "nf4",
    "check": {"seeds": 1},
    "holds": "r16.error < nf4.error and r128.error <= 0.9 * nf4.error",
    "refuted_by": "no reduction on a trained weight",
    "minutes": 2,
}


NAMES = ("layers.3.self_attn.q_proj", "layers.15.self_attn.k_proj", "layers.20.mlp.up_proj")


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims import probes

    totals = dict.fromkeys(("nf4", "r16", "r128"), 0.0)
    for name in NAMES:
        W = probes.smollm_weight(f"model.{name}.weight")
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        for arm, r in (("nf4", 0), ("r16", 16), ("r128", 128)):
            principal = U[:, :r] * S[:r] @ Vh[:r]
            kept = principal + probes.stored(W - principal, "nf4").dequantize().float()
            totals[arm] += probes.relative(kept, W) / len(NAMES)
    return {arm: {"error": error} for arm, error in totals.items()}
