"""Methods on a random basis that all sites share: VeRA and RandLoRA. PEFT's folders hold the basis beside the learned values
(`save_projection`); read here, it is kept as it is there, by the option of the same name.

RandLoRA differs in three ways that are folded into the tensors: PEFT keeps l as (r, n), its scale is alpha / r without the root of
the number of products, and column c of its flattened B belongs to row c of its flattened A (see randlora.py). PEFT's folders hold a
copy of RandLoRA's basis for each site, which makes them large; here it is written once.
"""

from __future__ import annotations

from typing import Any

from ..adapters.base import Adapter
from ..adapters.graft import Graft
from ..errors import IncompatibleError
from .peft_exchange import LAYERS, TARGETED, Exchange, Names, Place, Shapes, one_rank

_BASED: dict[str, Any] = {**TARGETED, **LAYERS, "bias": "none", "fan_in_fan_out": False, "init_weights": True, "projection_prng_key": 0,
                          "save_projection": True}


# -- VeRA -------------------------------------------------------------------------------------------------------------------
def _vera_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {"r": document.get("r", 256), "d_initial": document.get("d_initial", 0.1), "dropout": document.get("vera_dropout", 0.0),
            "save_projection": document.get("save_projection", True)}


def _vera_document(graft: Graft, names: Names) -> dict[str, Any]:
    return {"r": next(iter(graft.adapters.values())).r, "d_initial": graft.config.d_initial, "vera_dropout": graft.config.dropout,
            "projection_prng_key": graft.seed}


def _vera_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    return {"vera_lambda_d": Place(adapter.vera_d), "vera_lambda_b": Place(adapter.vera_b, factor=weight)}


def _vera_shared(graft: Graft, document: dict[str, Any]) -> dict[str, Place]:
    """The pair, cut to what the sites use: PEFT expects just that. A folder without it means what the seed gives."""
    if not document.get("save_projection", True):
        return {}
    sites = graft.adapters.values()
    A, B = graft.shared.on(next(iter(sites)).vera_d.device)
    rank, wide, tall = max(a.r for a in sites), max(a.in_features for a in sites), max(a.out_features for a in sites)
    return {"base_model.vera_A": Place(A[:rank, :wide], leading=True), "base_model.vera_B": Place(B[:tall, :rank], leading=True)}


VERA = Exchange("vera", {**_BASED, "peft_type": "VERA", "d_initial": 0.1, "r": 256, "vera_dropout": 0.0}, _vera_options, _vera_document,
                _vera_tensors, _vera_shared, only={"bias": ("none",)}, transposed=True, holds=one_rank, seed="projection_prng_key")


# -- RandLoRA ---------------------------------------------------------------------------------------------------------------
def _randlora_options(document: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    kind = "very_sparse" if document.get("very_sparse") else "sparse" if document.get("sparse") else "uniform"
    return {"r": document.get("r", 32), "alpha": document.get("randlora_alpha", 640), "dropout": document.get("randlora_dropout", 0.0),
            "distribution": kind, "save_projection": True}


def _randlora_document(graft: Graft, names: Names) -> dict[str, Any]:
    config = graft.config
    if not config.save_projection:
        raise IncompatibleError("PEFT cuts the bases of all sites from one pair; this graft draws one for each shape",
                                remedy="train it with save_projection: true, or convert --to merged, or give a rank")
    return {"r": config.r, "randlora_alpha": 2.0 * config.r if config.alpha is None else config.alpha, "randlora_dropout": config.dropout,
            "sparse": config.distribution == "sparse", "very_sparse": config.distribution == "very_sparse",
            "projection_prng_key": graft.seed}


def _randlora_tensors(adapter: Adapter, document: dict[str, Any], weight: float) -> dict[str, Place]:
    scale = document.get("randlora_alpha", 640) / adapter.r
    return {"randlora_lambda": Place(adapter.randlora_l, order=(1, 0), factor=adapter.scale * weight / scale),
            "randlora_gamma": Place(adapter.randlora_g)}


def _randlora_shared(graft: Graft, document: dict[str, Any]) -> dict[str, Place]:
    A, B = graft.shared.A, graft.shared.B
    (r, q), D = A.shape, B.shape[1]
    return {"base_model.randlora_A": Place(A, (r, 1, q), leading=True),
            "base_model.randlora_B": Place(B, (D, B.shape[0] // r, r), order=(1, 0), leading=True)}


RANDLORA = Exchange(
    "randlora", {**_BASED, "peft_type": "RANDLORA", "r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0, "sparse": False,
                 "very_sparse": False},
    _randlora_options, _randlora_document, _randlora_tensors, _randlora_shared,
    only={"bias": ("none",), "save_projection": (True,)}, transposed=True, seed="projection_prng_key",
    notes=("PEFT will name keys of randlora_A and randlora_B as missing: it looks for a copy of the basis at each site, and uses the one "
           "that is here",))
