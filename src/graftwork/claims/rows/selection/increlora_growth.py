"""IncreLoRA: adding ranks leaves the function as it is."""

CLAIM = {
    "system": "IncreLoRA",
    "statement": "growth adds rank without harm",
    "number": "exact",
    "source": "arXiv 2308.12043",
    "kind": "exactness",
    "setting": "a trained adapter of rank 2 with two reserves grows by 3 on every map of a small Llama; largest "
               "change of the logits against that of a new rank at its full size",
    "baseline": "full",
    "holds": "grown.difference <= 1e-4 and grown.ranks == 3 and full.difference >= 100 * grown.difference",
    "refuted_by": "a jump of the logits",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    model = probes.model(seed)
    graft = graftwork.attach(model, "increlora", r=2, alpha=4.0, reserve=2, seed=seed)
    probes.scatter(graft, seed)
    ids, draw = next(probes.batches(1, seed))["input_ids"], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = model(ids).logits
        for adapter in graft.adapters.values():
            adapter.grow(2, draw)
            adapter.grow(1, draw)
        grown = float((model(ids).logits - before).abs().max())
        ranks = {a.gate.shape[0] - 2 for a in graft.adapters.values()}
        for adapter in graft.adapters.values():
            adapter.gate[2:] = 1.0
        full = float((model(ids).logits - before).abs().max())
    return {"grown": {"difference": grown, "ranks": max(ranks)}, "full": {"difference": full}}
