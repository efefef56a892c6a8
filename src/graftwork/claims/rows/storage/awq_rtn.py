"""AWQ: inputs scaled before rounding against rounding to the nearest."""

CLAIM = {
    "system": "AWQ",
    "statement": "lower perplexity than rounding to the nearest and than GPTQ in 3 bits (LLaMA-2-7B, groups of 128)",
    "number": "6.24, RTN 6.66, GPTQ 6.43",
    "source": "arXiv 2306.00978",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 3 bits, "
               "groups of 64; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "awq.loss < rtn.loss and awq.loss <= gptq.loss",
    "refuted_by": "no lower than the nearest codes, or above GPTQ",
    "minutes": 12,
}

ARMS = {
    "rtn": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "gptq": {"method": "int3", "group_size": 64, "calibration": "gptq"},
    "awq": {"method": "int3", "group_size": 64, "calibration": "awq"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
