"""GPTQ: rounding column by column against rounding to the nearest."""

CLAIM = {
    "system": "GPTQ",
    "statement": "3-bit weights keep the perplexity where rounding to the nearest ruins it (OPT-175B)",
    "number": "8.68 against 7,300, dense 8.34",
    "source": "arXiv 2210.17323",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 3 bits, "
               "groups of 64; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "gptq.loss < rtn.loss",
    "refuted_by": "no lower loss than the nearest codes",
    "minutes": 8,
}

ARMS = {
    "rtn": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "gptq": {"method": "int3", "group_size": 64, "calibration": "gptq"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
