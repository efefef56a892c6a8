"""JLCM: codes that prefer near values against the plain gradient."""

CLAIM = {
    "system": "JLCM",
    "statement": "learning codes and code book together, with near codes preferred, keeps quality at about 2 bits (Llama-7B in 2 "
                 "GB)",
    "number": "2 GB",
    "source": "arXiv 2309.17361",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks, a code book"
               " of 8 values a map: k-means, learned with the plain gradient, and with near codes preferred; loss on 32 rows of "
               "256 tokens of wikitext2, calibration on 24 of c4, rows paired",
    "baseline": "plain",
    "check": {"tasks": [], "seeds": 1},
    "holds": "near.loss < plain.loss and near.loss < kmeans.loss",
    "refuted_by": "the plain gradient is as good",
    "minutes": 50,
}

ARMS = {
    "kmeans": {"method": "codebook", "bits": 3},
    "plain": {"method": "codebook", "bits": 3, "fit": "jlcm", "proximal": 0.0},
    "near": {"method": "codebook", "bits": 3, "fit": "jlcm"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import compare

    return compare(ARMS, seed, quick)
