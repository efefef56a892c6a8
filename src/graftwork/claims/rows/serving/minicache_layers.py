"""MiniCache: whether keys and values of neighboring layers are alike enough to share a direction."""

CLAIM = {
    "system": "MiniCache",
    "statement": "caches of adjacent layers are similar in the upper half of the model and merge with nearly no loss",
    "number": "5.02x smaller with 4 bits, near-lossless",
    "source": "arXiv 2405.14366",
    "first": 14,
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, 16 rows of 256 tokens of wikitext2: pairs of layers from the middle on share one "
               "direction (spherical interpolation at 0.6, tokens of the farthest 5 % of angles kept apart) and keep their norms, in "
               "the cache of the first 192 tokens; loss of the last 64, and the mean cosine of the pairs; the last three pairs alone "
               "beside it; published loss at most 1.05x",
    "baseline": "whole",
    "check": {"seeds": 1},
    "holds": "merged.loss <= 1.05 * whole.loss and merged.cosine >= 0.5",
    "refuted_by": "cosines near 0 and a loss that multiplies",
    "minutes": 5,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims import serving_runs as serving
    from graftwork.claims.storage_runs import windows

    model, tokenizer = serving.base(quick, blocks=4)
    layers = model.config.num_hidden_layers
    begins = {"whole": layers, "merged": layers // 2, "last": max(layers // 2, layers - 6)}
    losses, cosines = {arm: [] for arm in begins}, {arm: [] for arm in begins}
    for row in windows(tokenizer, 256, 2 if quick else 16, seed):
        for arm, first in begins.items():
            loss, found = continued(model, row.unsqueeze(0), 192, first)
            losses[arm].append(loss)
            cosines[arm] += found
    merged = {arm: {"loss": losses[arm], "cosine": sum(cosines[arm]) / len(cosines[arm])} for arm in ("merged", "last")}
    return {"whole": {"loss": losses["whole"]}, **merged}


def continued(model, ids, cached: int, first: int) -> tuple[float, list]:
    """(loss of the tokens after the cached ones, cosines of the pairs) with pairs of layers from `first` on merged."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        cache = model(ids[:, :cached], use_cache=True).past_key_values
        found = []
        for low in range(first, len(cache.layers) - 1, 2):
            pair = cache.layers[low:low + 2]
            for part in ("keys", "values"):
                *merged, cosine = shared(*(getattr(layer, part) for layer in pair))
                found.append(float(cosine.mean()))
                for layer, own in zip(pair, merged):
                    setattr(layer, part, own)
        logits = model(ids[:, cached:], past_key_values=cache, use_cache=True).logits[0, :-1]
        return float(F.cross_entropy(logits, ids[0, cached + 1:])), found


def shared(low, high, t: float = 0.6, gamma: float = 0.05):
    """(both layers as they are restored, cosines of their vectors). One direction for both, at t of the way from the lower one's to the
    higher one's; vectors whose angle is within gamma of the range below the largest stay as they are."""
    import torch
    import torch.nn.functional as F

    cosine = F.cosine_similarity(low, high, dim=-1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.arccos().unsqueeze(-1)
    both = F.normalize(low, dim=-1), F.normalize(high, dim=-1)
    direction = (torch.sin((1 - t) * angle) * both[0] + torch.sin(t * angle) * both[1]) / torch.sin(angle)
    nearest, farthest = angle.amin(-2, keepdim=True), angle.amax(-2, keepdim=True)
    apart = angle >= farthest - gamma * (farthest - nearest)
    return *(torch.where(apart, own, direction * own.norm(dim=-1, keepdim=True)) for own in (low, high)), cosine
