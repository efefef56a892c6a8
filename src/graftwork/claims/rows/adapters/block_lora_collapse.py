"""Block-LoRA: n up-projections on one A follow, step for step, one LoRA whose B learns n times as fast."""

CLAIM = {
    "system": "Block-LoRA",
    "statement": "fewer parameters and cheaper than LoRA of the advertised rank",
    "source": "arXiv 2501.16720",
    "headline": "no CLIP and no ImageNet for the few-shot accuracy",
    "kind": "exactness",
    "setting": "the n copies trained by hand in float64 against this method, 25 Adam steps on a small Llama, "
               "n=4, r=3; the rank is r, never n r",
    "baseline": "copies",
    "holds": "block.difference <= 1e-10 and block.excess_rank == 0",
    "refuted_by": "blocks that add capacity",
    "minutes": 1,
}


N, R, ALPHA = 4, 3, 18.0


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    by_hand, model = probes.model(seed, double=True), probes.model(seed, double=True)
    graft = graftwork.attach(model, "block_lora", r=R, n_blocks=N, alpha=ALPHA, target_modules=["q_proj", "down_proj"], seed=seed)
    for adapter in graft.adapters.values():
        adapter.double()
    pairs = {n: (a.lora_A.detach().clone().requires_grad_(), [torch.zeros_like(a.lora_B).requires_grad_() for _ in range(N)])
             for n, a in graft.adapters.items()}
    copies = torch.optim.Adam([p for A, blocks in pairs.values() for p in (A, *blocks)], lr=2e-3)
    ours = torch.optim.Adam([{"params": g["params"], "lr": 2e-3 * g["lr_scale"]} for g in graft.parameter_groups()])
    batch = next(probes.batches(1, seed))
    for _ in range(25):
        copies.zero_grad()
        ours.zero_grad()
        now = {f"{n}.weight": by_hand.get_submodule(n).weight + ALPHA / (N * R) * torch.cat(blocks, 1) @ torch.cat([A] * N)
               for n, (A, blocks) in pairs.items()}
        torch.func.functional_call(by_hand, now, (), batch).loss.backward()
        model(**batch).loss.backward()
        copies.step()
        ours.step()
    worst = excess = 0.0
    for name, (A, blocks) in pairs.items():
        change = (ALPHA / (N * R) * torch.cat(blocks, 1) @ torch.cat([A] * N)).detach()
        worst = max(worst, float((graft.adapters[name].delta_weight(None).detach() - change).abs().max()))
        excess = max(excess, int(torch.linalg.matrix_rank(change)) - R)
    return {"block": {"difference": worst, "excess_rank": excess}}
