"""EVA: the directions are the principal components of the inputs, and the budget of ranks goes where they explain most."""

CLAIM = {
    "system": "EVA",
    "statement": "the start explains the most activation variance at a rank budget",
    "number": "exact",
    "source": "arXiv 2410.07170",
    "kind": "exactness",
    "setting": "small Llama, one batch of 16 rows, budget 4 a site, rho 2; directions against the full SVD of "
               "the inputs in float64, explained share against uniform ranks of the same start",
    "baseline": "uniform",
    "holds": "eva.misfit <= 0.01 and eva.budget == uniform.budget and eva.explained > uniform.explained",
    "refuted_by": "a share no greater than that of uniform ranks",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes

    found, targets = {}, ["q_proj", "o_proj", "down_proj"]
    batch = next(probes.batches(1, seed, 16, 24))
    for arm, rho in (("eva", 2.0), ("uniform", 1.0)):
        model, inputs = probes.model(seed), {}
        graft = graftwork.attach(model, "lora", r=4, target_modules=targets, seed=seed, batches=[batch],
                                 initializer={"method": "eva", "rho": rho, "tau": 0.99})
        bare = probes.model(seed)
        for name in graft.adapters:
            bare.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, kept=inputs: kept.update({name: args[0].flatten(0, 1).double()}))
        bare(**batch)
        misfit, explained, total, budget = 0.0, 0.0, 0, 0
        for name, adapter in graft.adapters.items():
            _, S, Vh = torch.linalg.svd(inputs[name] - inputs[name].mean(0), full_matrices=False)
            own = torch.nn.functional.normalize(adapter.lora_A.detach().double(), dim=1)
            misfit = max(misfit, 1 - float(torch.linalg.svdvals(own @ Vh[: adapter.r].T).min()))  # of the subspaces
            explained += float(S[: adapter.r].square().sum() / S.square().sum())
            total, budget = total + 1, budget + adapter.r
        found[arm] = {"misfit": misfit, "explained": explained / total, "budget": budget}
    return found
