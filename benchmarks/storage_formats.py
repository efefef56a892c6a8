"""The rows of benchmarks/storage.py: {label: storage section}, what matters most first, so that a matrix cut short lacks the rest."""

from __future__ import annotations

from typing import Any

#: adaquant takes 100 steps by default, half an hour of a core each
CALIBRATIONS: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {}, "awq": {}, "hqq": {}, "adaquant": {"steps": 30}}
QUICK = ("dense", "int4, rtn", "int4, gptq", "int2, rtn", "int2, gptq")
#: what a fit of a code book takes by default is half an hour for jlcm (100 steps over the nearest 7 codes), ten minutes for edkm
FITS: dict[str, dict[str, Any]] = {"edkm": {"iterations": 25}, "jlcm": {"iterations": 10, "reach": 1}}
#: rows of calibration where they are not those of the others
ROWS_OF = {"int4, gptq, 64 rows": 64}
#: variants for which the minutes of the matrix have no room (they took longer to quantise than all others together), in this order:
#: `--later`; svdquant decomposes a map 61 times
LATER = ("int2, adaquant", "bitmod3, gptq", "spqr2", "fp4, gptq", "int4, adaquant", "int4, qllm", "int4, repquant", "vptq, 2 + 2 bits",
         "bitmod3, rtn", "codebook4", "nf3, groups", "nf2, groups", "fp8, e5m2", "int2, cbq", *ROWS_OF, "lowrank_plus3, svdquant")


def configurations() -> dict[str, dict[str, Any]]:
    """Integers by every calibration; a row or more of every other format; then the variants."""
    found = _all()
    return {label: found[label] for label in [*(label for label in found if label not in LATER), *LATER]}


def _all() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"dense": {"method": "dense"}, "int8": {"method": "int8"}}
    for label, own in CALIBRATIONS.items():
        extra = {"zero_point": "float"} if label == "hqq" else {}
        for bits in (4, 3, 2):
            found[f"int{bits}, {label}"] = {"method": f"int{bits}", "calibration": {"method": label, **own}, **extra}
    found["nf4"] = {"method": "nf4"}
    found["fp8, e4m3"] = {"method": "fp8"}
    for label, own in (("qllm", {"steps": 15}), ("repquant", {})):  # qllm takes 300 steps a window by default
        found[f"int4, {label}"] = {"method": "int4", "calibration": {"method": label, **own}}
    for calibration in ("rtn", "gptq"):
        found[f"fp4, {calibration}"] = {"method": "fp4", "calibration": calibration}
    found["fp4, zeroquant_fp m2"] = {"method": "fp4", "calibration": {"method": "zeroquant_fp", "constraint": "m2"}}
    for bits, calibration in ((4, "rtn"), (3, "rtn"), (3, "gptq")):
        found[f"bitmod{bits}, {calibration}"] = {"method": "bitmod", "bits": bits, "group_size": 64, "calibration": calibration}
    for bits in (4, 3, 2):
        if bits < 4:  # its groups are of 16
            found[f"spqr{bits}"] = {"method": "spqr", "bits": bits}
        found[f"codebook{bits}"] = {"method": "codebook", "bits": bits}
    for fit, own in FITS.items():
        found[f"codebook3, {fit}"] = {"method": "codebook", "bits": 3, "fit": fit, **own}
    found["vptq, 2 bits"] = {"method": "vptq"}
    found["vptq, 2 + 2 bits"] = {"method": "vptq", "residual_bits": 8}
    for init in ("lq_lora", "lorc", "svdquant"):
        found[f"lowrank_plus3, {init}"] = {"method": "lowrank_plus", "base": {"method": "int3"}, "init": init}
    for bits in (3, 2):
        found[f"nf{bits}, groups"] = {"method": "nf", "bits": bits}
    found["mixllm3"] = {"method": "mixllm", "bits": 3}
    for kind in ("q8_0", "q6_k", "q3_k", "q2_k"):
        found[f"gguf {kind}"] = {"method": "gguf", "type": kind}
    found["mixed, 3 bits"] = {"method": "mixed", "bits": 3.0}
    found["olive"] = {"method": "olive"}
    for label in ROWS_OF:
        found[label] = dict(found[label.rpartition(", ")[0]])
    found["fp8, e5m2"] = {"method": "fp8", "format": "e5m2"}
    found["int2, cbq"] = {"method": "int2", "calibration": {"method": "cbq", "steps": 40, "window": [1, 0]}}
    return found
