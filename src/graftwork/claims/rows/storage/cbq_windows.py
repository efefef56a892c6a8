"""CBQ: windows over several blocks against one block at a time."""

CLAIM = {
    "system": "CBQ",
    "statement": "reconstructing overlapping windows of blocks beats single blocks; 2-bit weights stay usable",
    "source": "arXiv 2312.07950",
    "kind": "quality_scaled",
    "setting": "the first 4 blocks of SmolLM2-135M-Instruct in 2 bits, groups of 64, 60 steps a window, 8 calibration rows of "
               "128 tokens of c4; relative error of the hidden states after the last of them, on 16 rows of wikitext2",
    "baseline": "single",
    "check": {"tasks": [], "seeds": 1},
    "holds": "windows.error < single.error and single.error < gptq.error and gptq.error < rtn.error",
    "refuted_by": "single blocks are as good",
    "minutes": 20,
}

TWO = {"method": "int2", "group_size": 64}


def measure(seed: int, quick: bool) -> dict:
    from graftwork.claims.storage_runs import Base

    base, steps = Base(seed, quick, 16, blocks=2 if quick else 4, calibration=(8, 128)), 3 if quick else 60
    cbq = {name: {"method": "cbq", "window": window, "steps": steps} for name, window in (("windows", (2, 1)), ("single", (1, 0)))}
    wanted = base.hidden(base.dense)
    found = {}
    for name, calibration in {**cbq, "gptq": "gptq", "rtn": "rtn"}.items():
        got = base.hidden(base.stored({**TWO, "calibration": calibration}))
        found[name] = {"error": ((got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).tolist()}
    return found
