"""RandLoRA: the change has full rank, with as few trained numbers as a LoRA whose rank is bounded."""

CLAIM = {
    "system": "RandLoRA",
    "statement": "a full-rank update with a LoRA-like number of parameters",
    "number": "min(in, out)",
    "source": "arXiv 2502.00987",
    "kind": "exactness",
    "setting": "20 AdamW steps on a small Llama, r=16, seven maps; LoRA r=4; rank of the learned changes in float64",
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
        for adapter in graft.adapters.values():
            change = _lora(adapter) if arm == "lora" else _randlora(adapter)
            least, n = min(change.shape), math.ceil(min(change.shape) / r)
            ranks.append(int(torch.linalg.matrix_rank(change)))
            missing += least - ranks[-1]
            counted += abs(sum(p.numel() for p in adapter.parameters() if p.requires_grad) - n * (r + least))
        found[arm] = {"rank": max(ranks), "missing": missing, "counted": counted}
    return found


def _lora(adapter):
    return adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()


def _randlora(adapter):
    """The learned change in float64, by the definition: sum_j B_j diag(l_j) A diag(g_j) from the drawn bytes."""
    import math

    import torch

    basis, level = adapter.basis, math.sqrt(3.0) / 128.0
    A = (basis.pool.draw(f"A/{basis.r}", basis.r, basis.q).double() + 0.5) * level
    blocks = -(-basis.n * basis.r // 128)
    columns = torch.cat([basis.pool.draw(f"B/{basis.q}/{i}", 128, basis.D) for i in range(blocks)])[: basis.n * basis.r]
    B = ((columns.double() + 0.5) * level).view(basis.n, basis.r, basis.D).transpose(1, 2)
    left, right = adapter.randlora_l.detach().double(), adapter.randlora_g.detach().double()
    return sum(B[j] @ torch.diag(left[j]) @ A @ torch.diag(right[j]) for j in range(basis.n))
