"""Computational limits of LoRA: the gradients of the factors, and their rank."""

CLAIM = {
    "system": "Computational limits of LoRA",
    "statement": "the gradients of LoRA have a low-rank structure that allows faster approximations below a norm "
                 "threshold",
    "source": "arXiv 2406.03136",
    "headline": "an asymptotic theorem: no speed follows for a size that can be run",
    "kind": "exactness",
    "setting": "small Llama in float64, r=3: gradient of A is s B^T G, of B it is s G A^T, and the change of a "
               "step has rank 2 r at most",
    "baseline": "full",
    "holds": "lora.error <= 1e-10 and lora.rank <= 6 and full.rank > 6",
    "refuted_by": "other gradients",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    model, merged = probes.model(seed, double=True), probes.model(seed, double=True)
    graft = graftwork.attach(model, "lora", r=3, alpha=6.0, seed=seed, target_modules=["q_proj", "up_proj"])
    probes.scatter(graft, seed)
    for name, adapter in graft.adapters.items():
        adapter.double()
        merged.get_submodule(name).weight.data += adapter.scale * adapter.lora_B.detach() @ adapter.lora_A.detach()
    gradients = probes.full_gradients(merged, list(graft.adapters), 2)
    probes.mean_loss(model, 2).backward()
    error, rank, whole = 0.0, 0, 10**6
    for name, adapter in graft.adapters.items():
        G, s, A, B = gradients[name], adapter.scale, adapter.lora_A.detach(), adapter.lora_B.detach()
        error = max(error, probes.relative(adapter.lora_A.grad, s * B.T @ G), probes.relative(adapter.lora_B.grad, s * G @ A.T))
        step = (B - 0.1 * adapter.lora_B.grad) @ (A - 0.1 * adapter.lora_A.grad) - B @ A
        rank, whole = max(rank, int(torch.linalg.matrix_rank(step, rtol=1e-8))), min(whole, int(torch.linalg.matrix_rank(G, rtol=1e-8)))
    return {"lora": {"error": error, "rank": rank}, "full": {"rank": whole}}
