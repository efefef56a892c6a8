"""BF16-or-death study: 8 bits for weights and inputs."""

CLAIM = {
    "system": "BF16-or-death study",
    "statement": "8-bit floats for weights and inputs are lossless, 8-bit integers lose 1 to 3 %",
    "number": "0 %, 1 to 3 %",
    "source": "arXiv 2411.02355",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks, a scale a "
               "row, inputs rounded by token; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired; "
               "0.01 nats count as lossless, 0.03 as 3 %",
    "baseline": "dense",
    "check": {"tasks": [], "seeds": 1},
    "holds": "fp8.loss - dense.loss <= 0.01 and int8.loss - dense.loss <= 0.03",
    "refuted_by": "a greater loss",
    "minutes": 8,
}

ARMS = {
    "dense": {"method": "dense"},
    "fp8": {"method": "fp8", "activations": "fp8"},
    "int8": {"method": "int_wide", "bits": 8, "group_size": -1, "activations": "int8"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
