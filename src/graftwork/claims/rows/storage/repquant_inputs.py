"""RepQuant: a step for every input channel, moved into the weight."""

CLAIM = {
    "system": "RepQuant",
    "statement": "rewriting channel-wise input steps into the weight keeps low-bit weights and inputs accurate; 6 bits are nearly "
                 "lossless",
    "source": "arXiv 2402.05628",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 6 bits, "
               "groups of 64, five outlier channels of 20x that change no output, inputs in 8 and in 4 bits by token; GPTQ "
               "inside and alone; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired; nearly "
               "lossless is 0.02 nats",
    "baseline": "gptq4",
    "check": {"tasks": [], "seeds": 1},
    "holds": "repquant4.loss < gptq4.loss and repquant8.loss - dense.loss <= 0.02",
    "holds_here": "repquant4.loss < gptq4.loss",
    "refuted_by": "no lower loss than GPTQ alone",
    "minutes": 16,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import Base, planted

    base = Base(seed, quick)
    found = {"dense": {"loss": base.losses(base.dense)}}
    for bits in (8, 4):
        kept = {"method": "int_wide", "bits": 6, "group_size": 64, "activations": f"int{bits}"}
        for name, calibration in (("gptq", "gptq"), ("repquant", {"method": "repquant", "bits": bits})):
            found[f"{name}{bits}"] = {"loss": base.losses(base.stored({**kept, "calibration": calibration}, planted))}
    return found
