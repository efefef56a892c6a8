"""SVDQuant: a low-rank branch in 16 bits beside 4-bit weights and inputs."""

CLAIM = {
    "system": "SVDQuant",
    "statement": "4-bit weights and inputs keep the quality with a low-rank branch where smoothing alone fails",
    "source": "arXiv 2411.05007",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks, five "
               "outlier channels of 20x that change no output, 4-bit weights in groups of 64 and 4-bit inputs by token: nearest "
               "codes, AWQ's scaling, and a branch of rank 16; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of "
               "c4, rows paired",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "branch.loss < smooth.loss and smooth.loss < rtn.loss",
    "refuted_by": "smoothing alone is as good",
    "minutes": 45,
}

ARMS = {
    "rtn": {"method": "int4", "group_size": 64, "activations": "int4"},
    "smooth": {"method": "int4", "group_size": 64, "activations": "int4", "calibration": "awq"},
    "branch": {"method": "lowrank_plus", "init": "svdquant", "r": 16, "activation_bits": 4, "iterations": 5, "smooth_steps": 8,
               "base": {"method": "int4", "group_size": 64, "activations": "int4"}},
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import Base, planted

    base = Base(seed, quick)
    return {name: {"loss": base.losses(base.stored(section, planted))} for name, section in ARMS.items()}
