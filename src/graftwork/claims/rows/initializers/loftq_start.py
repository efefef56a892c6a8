"""LoftQ: a start that makes up for what quantization loses, against a start at zero."""

CLAIM = {
    "system": "LoftQ",
    "statement": "starting from the quantization error outperforms QLoRA, above all at 2 bits",
    "source": "arXiv 2310.08659",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 2 and 4 bits, "
               "groups of 64, r=64, five rounds; the model before any training, which for QLoRA is the quantized base: loss on "
               "32 rows of 256 tokens of wikitext2, rows paired",
    "baseline": "qlora",
    "check": {"tasks": [], "seeds": 1},
    "holds": "loftq.loss2 < qlora.loss2 and loftq.loss4 < qlora.loss4",
    "refuted_by": "a start no better than zero",
    "minutes": 15,
}


def measure(seed: int, quick: bool) -> dict:
    import graftwork
    from graftwork.claims.storage_runs import Base

    base, found = Base(seed, quick, calibration=(1, 8)), {"loftq": {}, "qlora": {}}
    for bits, section in ((2, {"method": "int2", "group_size": 64}), (4, {"method": "nf4", "block_size": 64})):
        model = base.stored(section)
        found["qlora"][f"loss{bits}"] = base.losses(model)
        graftwork.attach(model, "lora", r=8 if quick else 64, target_modules="all-linear", seed=seed,
                         initializer={"method": "loftq", "iterations": 5})
        found["loftq"][f"loss{bits}"] = base.losses(model)
    return found
