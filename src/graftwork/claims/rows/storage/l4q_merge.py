"""L4Q: the integers that it ends in compute exactly what was trained."""

CLAIM = {
    "system": "L4Q",
    "statement": "the merged model is purely b-bit, without loss",
    "number": "exact",
    "source": "arXiv 2402.04902",
    "kind": "exactness",
    "setting": "small Llama in fp32, 2, 3 and 4 bits by seed, groups of 16; logits of the trained and of the "
               "merged model. LoRA merged into INT4 beside it",
    "baseline": "lora",
    "holds": "l4q.difference == 0 and lora.difference > 0.001",
    "refuted_by": "any difference",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes
    from graftwork.registry import make_config
    from graftwork.storage.base import apply_storage

    found, ids = {}, next(probes.batches(1, seed))["input_ids"]
    for arm in ("l4q", "lora"):
        model = probes.model(seed)
        if arm == "lora":
            model = apply_storage(model, make_config("storage", "int4", group_size=16))
            graft = graftwork.attach(model, "lora", r=4, seed=seed)
        else:
            graft = graftwork.attach(model, "l4q", bits=(2, 3, 4)[seed % 3], group_size=16, r=4, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for parameter in graft.parameters():
            size = 0.05 * parameter.detach().abs().mean() + (0.02 if arm == "lora" else 0)
            parameter.data += size * torch.randn(parameter.shape, generator=draw)
        with torch.no_grad():
            trained = model(ids).logits
            graft.merge(requantize=arm == "lora", force=True)
            found[arm] = {"difference": float((model(ids).logits - trained).abs().max())}
    return found
