"""The rows of benchmarks/storage.py: {label: storage section}, what matters most first, so that a matrix cut short lacks the rest."""

from __future__ import annotations

from typing import Any

#: adaquant takes 100 steps by default, half an hour of a core each
CALIBRATIONS: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {}, "awq": {}, "hqq": {}, "adaquant": {"steps": 30}}
QUICK = ("dense", "int4, rtn", "int4, gptq", "int2, rtn", "int2, gptq")
#: what a fit of a code book takes by default is most of an hour for jlcm (100 steps over the nearest 7 codes), ten minutes for edkm
FITS: dict[str, dict[str, Any]] = {"edkm": {"iterations": 25}, "jlcm": {"iterations": 10, "reach": 1}}
#: variants that come last, in this order; svdquant decomposes a map 61 times, which took above 20 minutes of a core
LATER = ("lowrank_plus2, lq_lora", "vptq, 2 + 2 bits", "codebook2, edkm", "int4, adaquant", "lowrank_plus2, lorc", "codebook2, jlcm",
         "bitmod3, rtn", "bitmod4, gptq", "codebook4", "fp4, awq", "mixllm4", "nf3, groups", "nf2, groups", "codebook3, weighted",
         "codebook2, weighted", "int3, gptq, act order", "int2, gptq, act order", "lowrank_plus4, lq_lora", "fp8, e5m2",
         "fp4, zeroquant_fp m1", "int2, cbq", "lowrank_plus3, svdquant", "lowrank_plus2, svdquant")


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
    for calibration in ("rtn", "gptq", "awq"):
        found[f"fp4, {calibration}"] = {"method": "fp4", "calibration": calibration}
    found["fp4, zeroquant_fp m2"] = {"method": "fp4", "calibration": {"method": "zeroquant_fp", "constraint": "m2"}}
    for bits in (4, 3):
        for calibration in ("rtn", "gptq"):
            found[f"bitmod{bits}, {calibration}"] = {"method": "bitmod", "bits": bits, "group_size": 64, "calibration": calibration}
    for bits in (4, 3, 2):
        if bits < 4:  # its groups are of 16
            found[f"spqr{bits}"] = {"method": "spqr", "bits": bits}
        found[f"codebook{bits}"] = {"method": "codebook", "bits": bits}
    for bits in (3, 2):
        found[f"codebook{bits}, weighted"] = {"method": "codebook", "bits": bits, "weighted": True}
        for fit, own in FITS.items():
            found[f"codebook{bits}, {fit}"] = {"method": "codebook", "bits": bits, "fit": fit, **own}
    found["vptq, 2 bits"] = {"method": "vptq"}
    found["vptq, 2 + 2 bits"] = {"method": "vptq", "residual_bits": 8}
    for base in (3, 2):
        for init in ("lq_lora", "lorc", "svdquant"):
            found[f"lowrank_plus{base}, {init}"] = {"method": "lowrank_plus", "base": {"method": f"int{base}"}, "init": init}
        found[f"nf{base}, groups"] = {"method": "nf", "bits": base}
    for wide in (4, 3):
        found[f"mixllm{wide}"] = {"method": "mixllm", "bits": wide}
    for kind in ("q8_0", "q6_k", "q3_k", "q2_k"):
        found[f"gguf {kind}"] = {"method": "gguf", "type": kind}
    found["mixed, 3 bits"] = {"method": "mixed", "bits": 3.0}
    found["olive"] = {"method": "olive"}
    for bits in (3, 2):
        found[f"int{bits}, gptq, act order"] = {"method": f"int{bits}", "calibration": {"method": "gptq", "act_order": True}}
    found["lowrank_plus4, lq_lora"] = {"method": "lowrank_plus", "base": {"method": "int4"}, "init": "lq_lora"}
    found["fp8, e5m2"] = {"method": "fp8", "format": "e5m2"}
    found["fp4, zeroquant_fp m1"] = {"method": "fp4", "calibration": {"method": "zeroquant_fp", "constraint": "m1"}}
    found["int2, cbq"] = {"method": "int2", "calibration": {"method": "cbq", "steps": 40, "window": [1, 0]}}
    return found
