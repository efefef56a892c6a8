"""HQQ: float zeros fitted without data against calibrated codes."""

CLAIM = {
    "system": "HQQ",
    "statement": "no calibration data, and as good as calibrated methods",
    "source": "Mobius Labs, 2023",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 3 bits, "
               "groups of 64, zeros in floats for HQQ; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows"
               " paired",
    "baseline": "gptq",
    "check": {"tasks": [], "seeds": 1},
    "holds": "hqq.loss < rtn.loss and hqq.loss <= gptq.loss",
    "refuted_by": "worse than GPTQ, or than the nearest codes",
    "minutes": 9,
}

ARMS = {
    "rtn": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "gptq": {"method": "int3", "group_size": 64, "calibration": "gptq"},
    "hqq": {"method": "int3", "group_size": 64, "calibration": "hqq", "zero_point": "float"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
