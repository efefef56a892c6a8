"""LLaMA3 low-bit study: what fewer bits cost."""

CLAIM = {
    "system": "LLaMA3 low-bit study",
    "statement": "low-bit degradation is not negligible, and ruin at 2 bits and less",
    "source": "arXiv 2404.14047",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 8, 3 and "
               "2 bits, groups of 64, nearest codes and GPTQ; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of "
               "c4, rows paired; ruin: perplexity doubled (0.69 nats)",
    "baseline": "dense",
    "check": {"tasks": [], "seeds": 1},
    "holds": "dense.loss < gptq3.loss and gptq3.loss < gptq2.loss and int8.loss < rtn3.loss and rtn3.loss < rtn2.loss and "
             "rtn2.loss - dense.loss >= 0.69 and gptq2.loss - dense.loss >= 0.69",
    "refuted_by": "no trend over the bits",
    "minutes": 16,
}

ARMS = {
    "dense": {"method": "dense"},
    "int8": {"method": "int_wide", "bits": 8, "group_size": 64},
    "rtn3": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "gptq3": {"method": "int3", "group_size": 64, "calibration": "gptq"},
    "rtn2": {"method": "int2", "group_size": 64, "calibration": "rtn"},
    "gptq2": {"method": "int2", "group_size": 64, "calibration": "gptq"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
