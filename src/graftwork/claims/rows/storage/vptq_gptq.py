"""VPTQ: vectors in a code book against scalar codes of as many bits."""

CLAIM = {
    "system": "VPTQ",
    "statement": "2-bit weights as vectors: perplexity 6.13 at 2.02 bits, GPTQ 50.75 at 2.125 (LLaMA-2-7B)",
    "number": "6.13 against 50.75",
    "source": "arXiv 2409.17066",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks, vectors of "
               "4 with 8-bit indices (code books counted) against 2-bit codes in groups of 64; loss on 32 rows of 256 tokens of "
               "wikitext2, calibration on 24 of c4, rows paired",
    "baseline": "gptq",
    "check": {"tasks": [], "seeds": 1},
    "holds": "vptq.loss < gptq.loss and gptq.loss < rtn.loss and vptq.bits <= 1.05 * gptq.bits",
    "refuted_by": "no lower loss at as many stored bits",
    "minutes": 35,
}

ARMS = {
    "rtn": {"method": "int2", "group_size": 64},
    "gptq": {"method": "int2", "group_size": 64, "calibration": "gptq"},
    "vptq": {"method": "vptq"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
