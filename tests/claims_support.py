"""Shared by the tests of claims: a claim made by hand, its verdict, a tiny config."""

from __future__ import annotations

import tiny
from graftwork.claims.claim import Claim, Fields
from graftwork.claims.run import run_claim

BASIC = {"system": "X", "statement": "smaller", "source": "arXiv 0000.00000", "setting": "tiny", "refuted_by": "larger", "minutes": 1}


def made(kind, holds, arms, *, check=None, baseline="base", common=None, measure=None, **more) -> Claim:
    fields = {**BASIC, "kind": kind, "holds": holds, "arms": arms, "check": check or {}, "common": common or {},
              "baseline": baseline if arms else None, **more}
    return Claim("made", "tests", Fields(**fields), measure)


def verdict(claim, folder, **options):
    return run_claim(claim, folder, **options)["verdict"]


def tiny_config(folder) -> str:
    tiny.llama_config(tied=False).save_pretrained(folder)
    return str(folder / "config.json")
