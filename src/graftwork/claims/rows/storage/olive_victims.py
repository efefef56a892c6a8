"""OliVe: outliers that take their neighbor's code against clipping and against plain codes."""

CLAIM = {
    "system": "OliVe",
    "statement": "giving up the neighbors of outliers beats clipping them; 4 bits near full precision",
    "source": "arXiv 2304.07493",
    "kind": "quality_scaled",
    "setting": "SmolLM2-135M-Instruct (de-quantized 4-bit weights with groups of 32), all linear maps of the blocks in 4 bits, "
               "one scale a row: OliVe, nearest codes from the least to the largest weight, and weights clipped at three "
               "standard deviations before; loss on 32 rows of 256 tokens of wikitext2, calibration on 24 of c4, rows paired",
    "baseline": "rtn",
    "check": {"tasks": [], "seeds": 1},
    "holds": "olive.loss < rtn.loss and olive.loss < clipped.loss",
    "refuted_by": "rounding to the nearest is as good",
    "minutes": 8,
}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import Base

    base, plain = Base(seed, quick), {"method": "int4", "group_size": -1}
    models = {"rtn": base.stored(plain), "clipped": base.stored(plain, clip), "olive": base.stored({"method": "olive"})}
    return {name: {"loss": base.losses(model)} for name, model in models.items()}


def clip(model) -> None:
    """Every weight row of the blocks within three standard deviations."""
    import torch

    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if name.endswith("proj.weight"):
                limit = 3 * parameter.std(1, keepdim=True)
                parameter.copy_(torch.minimum(torch.maximum(parameter, -limit), limit))
