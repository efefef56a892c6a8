"""BitMoD: a special value for every group against plain integers."""

CLAIM = {
    "system": "BitMoD",
    "statement": "3-bit weights better than prior formats; 4 bits lose less than 0.5 % (LLaMA-2-7B, groups of 128)",
    "number": "< 0.5 %",
    "source": "arXiv 2411.11745",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 3 and 4 "
               "bits, groups of 64, nearest codes; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows "
               "paired",
    "baseline": "int3",
    "check": {"tasks": [], "seeds": 1},
    "holds": "bitmod3.loss < int3.loss and bitmod4.loss < int4.loss",
    "holds_here": "bitmod3.loss < int3.loss",
    "refuted_by": "integers with zeros at 3 bits are as good",
    "minutes": 9,
}

ARMS = {
    "int3": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "bitmod3": {"method": "bitmod", "bits": 3, "group_size": 64},
    "int4": {"method": "int4", "group_size": 64},
    "bitmod4": {"method": "bitmod", "bits": 4, "group_size": 64},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
