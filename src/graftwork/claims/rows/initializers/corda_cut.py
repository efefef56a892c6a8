"""CorDA: what matters least to the inputs of some text can be taken out of every weight, where the smallest singular values cannot."""

CLAIM = {
    "system": "CorDA",
    "statement": "leaving out the components that matter least to the data costs far less than leaving out the smallest singular values",
    "source": "arXiv 2406.05223",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks without their last "
               "64 and 128 components (of at most 576), covariances of 24 rows of c4 (mode kpm, whose adapter starts as these); loss "
               "on 32 rows of 256 tokens of wikitext2, rows paired",
    "baseline": "svd",
    "check": {"tasks": [], "seeds": 1},
    "holds": "corda.loss64 < svd.loss64 and corda.loss128 < svd.loss128",
    "refuted_by": "the plain decomposition is as good",
    "minutes": 12,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims.storage_runs import Base

    base, found = Base(seed, quick), {"corda": {}, "svd": {}}
    found["dense"] = {"loss": base.losses(base.dense)}
    for r in (64, 128):
        graft = graftwork.attach(base.dense, "lora", r=r, target_modules="all-linear", batches=base.calibration.batches(), seed=seed,
                                 initializer={"method": "corda", "mode": "kpm"})
        for adapter in graft.adapters.values():
            adapter.lora_B.data.zero_()  # what the base that is used lacks stays out
        found["corda"][f"loss{r}"] = base.losses(base.dense)
        sites = {name: site.module for name, site in graft.sites.items()}
        graft.detach()
        kept = {name: module.weight.data for name, module in sites.items()}
        for name, module in sites.items():
            U, S, V = torch.linalg.svd(kept[name], full_matrices=False)
            module.weight.data = (U[:, :-r] * S[:-r]) @ V[:-r]
        found["svd"][f"loss{r}"] = base.losses(base.dense)
        for name, module in sites.items():
            module.weight.data = kept[name]
    return found
