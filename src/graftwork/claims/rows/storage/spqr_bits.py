"""SpQR: weights that would cost too much kept apart, against plain codes of as many bits."""

CLAIM = {
    "system": "SpQR",
    "statement": "less than 1 % relative perplexity loss at more than 4x compression",
    "number": "< 1 %",
    "source": "arXiv 2306.03078",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks; SpQR with "
               "3-bit codes in groups of 16, GPTQ with 3 bits in groups of 24 (4.5 bits a weight in all); loss on 32 rows of 256"
               " tokens of wikitext2, calibration on 24 of c4, rows paired; 1 % of perplexity is 0.01 nats",
    "baseline": "gptq",
    "check": {"tasks": [], "seeds": 1},
    "holds": "spqr.loss - dense.loss <= 0.01 and spqr.loss < gptq.loss and spqr.bits <= 4",
    "holds_here": "spqr.loss < gptq.loss and spqr.bits <= gptq.bits",
    "refuted_by": "above GPTQ at as many bits",
    "minutes": 14,
}

ARMS = {
    "dense": {"method": "dense"},
    "gptq": {"method": "int3", "group_size": 16, "calibration": "gptq"},
    "spqr": {"method": "spqr", "bits": 3},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
