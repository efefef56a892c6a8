"""AdaQuant: weights and scales trained through the rounding on a small calibration set."""

CLAIM = {
    "system": "AdaQuant",
    "statement": "layer by layer training on a tiny calibration set beats rounding, without overfitting (ResNet-50 W4A4 loses less"
                 " than 1 %)",
    "number": "< 1 %",
    "source": "arXiv 2006.10518",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 3 bits, "
               "groups of 64; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired; the text is "
               "another than the calibration's",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "adaquant.loss < rtn.loss",
    "refuted_by": "a loss that is no lower on text that was not calibrated on",
    "minutes": 25,
}

ARMS = {
    "rtn": {"method": "int3", "group_size": 64, "calibration": "rtn"},
    "adaquant": {"method": "int3", "group_size": 64, "calibration": "adaquant"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
