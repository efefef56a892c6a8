"""QA-LoRA: the adapter goes into the zero points, and the merged model is as quantized as before."""

CLAIM = {
    "system": "QA-LoRA",
    "statement": "after tuning, base and adapter become one quantized model without loss of accuracy",
    "number": "exact",
    "source": "arXiv 2309.14717",
    "kind": "exactness",
    "setting": "small Llama in fp32, INT4 with float zero points, groups of 16, random factors; logits of the tuned and of the merged "
               "model, relative, and codes that changed. LoRA of the same rank merged into the same codes beside it",
    "baseline": "lora",
    "holds": "qa_lora.difference <= 1e-5 and qa_lora.changed == 0 and lora.difference >= 100 * qa_lora.difference",
    "refuted_by": "a loss above rounding of fp32, or a code that changed",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import torch

    import graftwork
    from graftwork.claims import probes
    from graftwork.registry import make_config
    from graftwork.storage.base import apply_storage

    found, ids = {}, next(probes.batches(1, seed))["input_ids"]
    for arm, options in (("qa_lora", {"group_size": 16}), ("lora", {})):
        config = make_config("storage", "int4", group_size=16, zero_point="float", scale_dtype="fp32")
        model = apply_storage(probes.model(seed), config)
        graft = graftwork.attach(model, arm, r=4, seed=seed, target_modules="all-linear", **options)
        probes.scatter(graft, seed)
        codes = _codes(model)
        with torch.no_grad():
            tuned = model(ids).logits
            graft.merge(requantize=True, force=True)
            merged = model(ids).logits
        changed = sum(int((codes[name] != now).sum()) for name, now in _codes(model).items())
        found[arm] = {"difference": probes.relative(merged, tuned), "changed": changed}
    return found


def _codes(model) -> dict:
    return {n: m.leaves()["codes"].clone() for n, m in model.named_modules() if hasattr(m, "leaves")}
