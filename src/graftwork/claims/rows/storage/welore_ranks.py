"""WeLore: one threshold on all singular values against the same share of every matrix."""

CLAIM = {
    "system": "WeLore",
    "statement": "ranks by one threshold on the normalized singular values lose far less than uniform ranks",
    "source": "arXiv 2407.11239",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks cut to their first "
               "singular values, 10, 20 and 30 % of all left out, by threshold and the same share of each; loss on 32 rows of 256 tokens "
               "of wikitext2, rows paired; the share that the threshold leaves out against the wanted one",
    "baseline": "uniform",
    "check": {"tasks": [], "seeds": 1},
    "holds": "welore.loss10 < uniform.loss10 and welore.loss20 < uniform.loss20 and welore.loss30 < uniform.loss30 and welore.missed "
             "<= 210",
    "refuted_by": "uniform ranks are as good",
    "minutes": 10,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    from graftwork.claims.storage_runs import Base
    from graftwork.initializers.welore import normalized, threshold
    from graftwork.modeling.sites import find_sites

    base = Base(seed, quick, calibration=(1, 8))
    sites = find_sites(base.dense, "all-linear")
    parts = {site.name: torch.linalg.svd(site.module.weight, full_matrices=False) for site in sites}
    spectra = {name: normalized(S) for name, (_, S, _) in parts.items()}
    total = sum(len(s) for s in spectra.values())
    found = {"welore": {"missed": []}, "uniform": {}}
    for percent in (10, 20, 30):
        theta = threshold(spectra, percent / 100)
        ranks = {name: int((s >= theta).sum()) for name, s in spectra.items()}
        found["welore"]["missed"].append(abs(total - sum(ranks.values()) - percent / 100 * total))
        for arm in found:
            for site in sites:
                U, S, V = parts[site.name]
                k = ranks[site.name] if arm == "welore" else round((1 - percent / 100) * len(S))
                site.module.weight.data = (U[:, :k] * S[:k]) @ V[:k]
            found[arm][f"loss{percent}"] = base.losses(base.dense)
    found["welore"]["missed"] = max(found["welore"]["missed"])
    return found
