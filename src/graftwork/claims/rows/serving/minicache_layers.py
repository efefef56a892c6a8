"""MiniCache: whether keys and values of neighboring layers are alike enough to share a direction."""

CLAIM = {
    "system": "MiniCache",
    "statement": "caches of adjacent layers are similar in the upper half of the model and merge with nearly no loss",
    "number": "5.02x smaller with 4 bits, near-lossless",
    "source": "arXiv 2405.14366",
    "first": 14,
    "kind": "serving",
    "setting": "SmolLM2-135M-Instruct fp32, 16 rows of 256 tokens of wikitext2: pairs of layers from the middle on share one "
               "direction (spherical mean) and keep their norms, in the cache of the first 192 tokens; loss of the last 64, and "
               "the mean cosine of the pairs; published loss at most 1.05x",
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
    losses, cosines = {"whole": [], "merged": []}, []
    for row in windows(tokenizer, 256, 2 if quick else 16, seed):
        for arm in losses:
            loss, cosine = continued(model, row.unsqueeze(0), 192, arm == "merged")
            losses[arm].append(loss)
            cosines += cosine
    return {"whole": {"loss": losses["whole"]}, "merged": {"loss": losses["merged"], "cosine": sum(cosines) / len(cosines)}}


def continued(model, ids, first: int, merge: bool) -> tuple[float, list]:
    """(loss of the tokens after the first ones, cosines of the pairs) with the cache of the first ones as it is or merged."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        cache = model(ids[:, :first], use_cache=True).past_key_values
        found = []
        if merge:
            layers = cache.layers
            for low in range(len(layers) // 2, len(layers) - 1, 2):
                for part in ("keys", "values"):
                    a, b = (getattr(layers[k], part) for k in (low, low + 1))
                    direction, cosine = shared(a, b)
                    found.append(float(cosine.mean()))
                    for layer, own in ((layers[low], a), (layers[low + 1], b)):
                        setattr(layer, part, direction * own.norm(dim=-1, keepdim=True))
        logits = model(ids[:, first:], past_key_values=cache, use_cache=True).logits[0, :-1]
        return float(F.cross_entropy(logits, ids[0, first + 1:])), found


def shared(a, b):
    """(unit vectors halfway between the directions of a and b on the sphere, their cosines)."""
    import torch.nn.functional as F

    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return F.normalize(a + b, dim=-1), (a * b).sum(-1)
