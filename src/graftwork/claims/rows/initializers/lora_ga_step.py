"""LoRA-GA: the first step of the factors is the best low-rank copy of the full step."""

CLAIM = {
    "system": "LoRA-GA",
    "statement": "the first step is the best rank-2r copy of the full fine-tuning step",
    "number": "exact",
    "source": "arXiv 2407.05000",
    "kind": "exactness",
    "setting": "small Llama, r=4, two kinds of maps; B0 B0^T G + G A0^T A0 against the SVD of the full gradient "
               "by autograd; LoRA's random start beside it",
    "baseline": "lora",
    "holds": "ga.error <= 1e-3 and ga.cosine >= 0.999 and ga.cosine > lora.cosine",
    "refuted_by": "a step that is not the truncated SVD",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found, targets = {}, ["q_proj", "down_proj"]
    for arm, start in (("ga", {"method": "lora_ga", "direction": "ArB2r", "scale": "unit", "niter": 12}), ("lora", None)):
        model = probes.model(seed)
        graft = graftwork.attach(model, "lora", r=4, target_modules=targets, seed=seed, initializer=start,
                                 batches=probes.batches(2, seed) if start else None)
        gradients = probes.full_gradients(probes.model(seed), list(graft.adapters), 2, seed)
        error, cosines = 0.0, []
        for name, adapter in graft.adapters.items():
            G = gradients[name].double()
            B, A = adapter.lora_B.detach().double(), adapter.lora_A.detach().double()
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
            best = U[:, :8] * S[:8] @ Vh[:8]
            step = B @ B.T @ G + G @ A.T @ A
            error = max(error, probes.relative(step, best))
            cosines.append(float((step * best).sum() / step.norm() / best.norm()))
        found[arm] = {"error": error, "cosine": min(cosines)}
    return found
