"""ZeroQuant-FP: floats against integers for inputs and weights."""

CLAIM = {
    "system": "ZeroQuant-FP",
    "statement": "FP8 inputs beat INT8 inputs, and FP4 weights are as good as INT4 or better",
    "source": "arXiv 2307.09782",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks: 8-bit "
               "weights a row with inputs in INT8 or FP8 by token, the same with five outlier channels of 20x that change no "
               "output, and 4-bit weights in groups of 64; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, "
               "rows paired",
    "baseline": "int8",
    "check": {"tasks": [], "seeds": 1},
    "holds": "fp8.loss < int8.loss and fp8_outliers.loss < int8_outliers.loss and fp4.loss <= int4.loss",
    "refuted_by": "INT8 inputs are as good, or INT4 weights better",
    "minutes": 14,
}

ARMS = {
    "int8": {"method": "int_wide", "bits": 8, "group_size": -1, "activations": "int8"},
    "fp8": {"method": "fp8", "activations": "fp8"},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import Base, planted

    base, found = Base(seed, quick), {}
    for name, section in {**ARMS, "int4": {"method": "int4", "group_size": 64}, "fp4": {"method": "fp4", "group_size": 64}}.items():
        found[name] = {"loss": base.losses(base.stored(section))}
    for name, section in ARMS.items():
        found[f"{name}_outliers"] = {"loss": base.losses(base.stored(section, planted))}
    return found
