"""RandLoRA: the change has full rank, with as few trained numbers as a LoRA whose rank is bounded."""

CLAIM = {
    "system": "RandLoRA",
    "statement": "a full-rank update with a LoRA-like number of parameters",
    "number": "min(in, out)",
    "source": "arXiv 2502.00987",
    "kind": "exactness",
    "setting": "20 AdamW steps on a small Llama, r=16, seven maps; LoRA r=4; singular values above 1e-6 of the largest",
    "baseline": "lora",
    "holds": "randlora.missing == 0 and randlora.counted == 0 and lora.rank <= 4",
    "refuted_by": "a rank of at most r",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import math

    import torch

    import graftwork
    from graftwork.claims import probes

    found = {}
    for arm, r in (("randlora", 16), ("lora", 4)):
        model = probes.model(seed)
        graft = graftwork.attach(model, arm, r=r, seed=seed)
        optimizer = torch.optim.AdamW(graft.parameters(), lr=1e-2)
        for step in range(20):
            optimizer.zero_grad()
            probes.mean_loss(model, 1, step).backward()
            optimizer.step()
        ranks, missing, counted = [], 0, 0
        for name, change in graft.delta_weights().items():
            adapter = graft.adapters[name]
            least, n = min(change.shape), math.ceil(min(change.shape) / r)
            ranks.append(int(torch.linalg.matrix_rank(change.double(), rtol=1e-6)))
            missing += least - ranks[-1]
            counted += abs(sum(p.numel() for p in adapter.parameters() if p.requires_grad) - n * (r + least))
        found[arm] = {"rank": max(ranks), "missing": missing, "counted": counted}
    return found
