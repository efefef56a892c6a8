"""QLLM: outlier channels taken apart before inputs are rounded."""

CLAIM = {
    "system": "QLLM",
    "statement": "taking outlier channels apart keeps low-bit weights and inputs usable: 7.89 points over the best prior method on"
                 " five tasks (LLaMA-2-70B, W4A4)",
    "number": "+7.89",
    "source": "arXiv 2310.08041",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks, five "
               "outlier channels of 20x that change no output, 3-bit weights in groups of 64 and 4-bit inputs by token: nearest "
               "codes, AWQ's scaling, QLLM (100 steps a window); loss on 32 rows of 256 tokens of wikitext2, calibration on 24 "
               "of c4, rows paired",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "qllm.loss < smooth.loss and smooth.loss < rtn.loss",
    "refuted_by": "smoothing is as good",
    "minutes": 60,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.kinds.base import NotCheckable
    from graftwork.claims.storage_runs import Base, planted
    from graftwork.registry import methods

    if "qllm" not in {info.name for info in methods("calibration")}:
        raise NotCheckable("calibration qllm is not registered")
    arms = {"rtn": "rtn", "smooth": "awq", "qllm": {"method": "qllm", "steps": 2 if quick else 100}}
    base = Base(seed, quick)
    kept = {"method": "int3", "group_size": 64, "activations": "int4"}
    return {name: {"loss": base.losses(base.stored({**kept, "calibration": own}, planted))} for name, own in arms.items()}
