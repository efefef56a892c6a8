"""FLoRA (federated): stacking the clients' factors gives their weighted sum; averaging A and B apart does not."""

CLAIM = {
    "system": "FLoRA (federated)",
    "statement": "stacking adapters of any ranks aggregates them without noise; averaging A and B separately does not",
    "number": "exact",
    "source": "arXiv 2409.05976",
    "first": 15,
    "kind": "exactness",
    "check": {"seeds": 3},
    "setting": "4, 7 and 10 clients of ranks 1 to 8 (together below the width of 96) with random factors, scalings and weights, a small "
               "Llama's seven maps; fp32 sums against those of the dense changes in float64",
    "baseline": "average",
    "holds": "stack.error <= 1e-6 and average.error >= 0.1",
    "refuted_by": "a stacked sum that is not the weighted sum",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims.bases import small_llama
    from graftwork.interchange.combine import combine

    draw = torch.Generator().manual_seed(seed)
    model, clients = small_llama(64, 0, width=96, blocks=1), (4, 7, 10)[seed % 3]
    weights = torch.rand(clients, generator=draw, dtype=torch.float64)
    weights = (weights / weights.sum()).tolist()
    grafts = []
    for i in range(clients):
        r = int(torch.randint(1, 9, (), generator=draw))
        graft = graftwork.attach(model, "lora", name=f"client{i}", r=r, alpha=float(1 + i))
        for parameter in graft.parameters():
            parameter.data.normal_(generator=draw)
        grafts.append(graft)
    made, _ = combine(grafts, "linear", weights=weights)
    stacked = averaged = whole = 0.0
    for name in grafts[0].adapters:
        parts = [_factors(g.adapters[name]) for g in grafts]
        wanted = sum(w * s * (B @ A) for w, (A, B, s) in zip(weights, parts))
        A, B, s = _factors(made.adapters[name])
        apart = _padded_mean([s * B for _, B, s in parts], weights, 1) @ _padded_mean([A for A, _, _ in parts], weights, 0)
        stacked += float((s * (B @ A) - wanted).square().sum())
        averaged += float((apart - wanted).square().sum())
        whole += float(wanted.square().sum())
    return {"stack": {"error": (stacked / whole) ** 0.5}, "average": {"error": (averaged / whole) ** 0.5}}


def _factors(adapter):
    return adapter.lora_A.detach().double(), adapter.lora_B.detach().double(), float(adapter.scale)


def _padded_mean(factors, weights, axis: int):
    """Weighted mean of factors whose rank (on `axis`) is filled up with zeros, as the zero-padding baselines do."""
    import torch

    most = max(f.shape[axis] for f in factors)
    pad = [(0, most - f.shape[1]) if axis == 1 else (0, 0, 0, most - f.shape[0]) for f in factors]
    return sum(w * torch.nn.functional.pad(f, p) for w, f, p in zip(weights, factors, pad))
