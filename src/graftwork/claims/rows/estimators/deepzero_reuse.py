"""DeepZero: a forward that restarts at the block of the coordinate gives the same estimate as a whole one."""

CLAIM = {
    "system": "DeepZero",
    "statement": "feature reuse and parallel forwards speed up coordinate-wise estimates without changing them",
    "number": "exact",
    "source": "arXiv 2310.02025",
    "kind": "exactness",
    "check": {"seeds": 2},
    "setting": "Llama of 2 blocks of width 48 trained from random weights, 12 coordinates a step, two steps of SGD with and without reuse; "
               "largest difference of the weights. The time is not judged here",
    "baseline": "whole",
    "holds": "reuse.difference == 0 and whole.moved > 0",
    "refuted_by": "other weights",
    "minutes": 1,
}


def measure(seed: int, quick: bool) -> dict:
    import tempfile
    from pathlib import Path

    import torch

    from graftwork.claims.kinds._real import RealOptions, real_step

    check, ends = RealOptions(width=48, blocks=2, rows=2, length=16), {}
    with tempfile.TemporaryDirectory() as place:
        for reuse in (True, False):
            step, batch = real_step(check, {"adapter": None, "optimizer": {"method": "sgd", "momentum": 0.0, "lr": 1.0}, "estimator": {
                "method": "deepzero", "reuse": reuse, "max_coordinates": 12, "grasp_samples": 4}}, Path(place), seed)
            start = [p.detach().clone() for _, p in step.parameters]
            for number in range(2):
                step.run([batch], number)
            ends[reuse] = [p.detach() for _, p in step.parameters]
    moved = max(float((a - b).abs().max()) for a, b in zip(ends[False], start))
    difference = max(float((a - b).abs().max()) for a, b in zip(ends[True], ends[False]))
    assert all(torch.isfinite(p).all() for p in ends[True])
    return {"reuse": {"difference": difference}, "whole": {"moved": moved}}
