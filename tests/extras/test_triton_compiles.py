"""The Triton kernels go through the compilers of GPUs, which need no GPU. They are not run. Run by `make test-triton`."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") is not None:
    pytest.skip("needs Triton without its interpreter: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="make test-triton")

import triton
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from graftwork.adapters import _triton_kernels  # noqa: E402

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {"hidden": "*fp32", "factors": "*fp32", "index": "*i64", "starts": "*i64", "order": "*i64", "tiles": "*i64"}
BLOCKS = {
    "_shrink_rows": {"POSITIONS": False, "BLOCK_R": 16, "BLOCK_K": 128},
    "_expand_rows": {"BIAS": True, "FACTORS": True, "BLOCK_R": 16, "BLOCK_N": 128},
    "_shrink_tiles": {"POSITIONS": False, "WIDE": False, "BLOCK_M": _triton_kernels.BLOCK_M, "BLOCK_R": 64, "BLOCK_K": 64},
    "_expand_tiles": {"BIAS": True, "FACTORS": True, "BLOCK_M": _triton_kernels.BLOCK_M, "BLOCK_R": 32, "BLOCK_N": 64},
}


def build(name, dtype, target, **changed):
    kernel, constants = getattr(_triton_kernels, name), {**BLOCKS[name], **changed}
    positions = constants.get("POSITIONS")
    signature = {arg: "constexpr" if arg in constants else TYPES.get(arg) or ("*i64" if arg == "A" and positions else
                 f"*{dtype}" if arg in ("x", "A", "B", "y", "bias") else "i32") for arg in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants), target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles(name, dtype, target):
    asm = build(name, dtype, TARGETS[target]).asm
    assert asm.get("cubin") or asm.get("hsaco")
    if name == "_shrink_tiles" and dtype != "fp32":  # products by the units that are there for them
        text = asm["ptx"] if target.startswith("sm") else asm["amdgcn"]
        assert "mma" in text or "mfma" in text


@pytest.mark.parametrize("name, changed", [
    ("_shrink_rows", {"POSITIONS": True}), ("_shrink_tiles", {"POSITIONS": True}), ("_shrink_rows", {"BLOCK_R": 1}),
    ("_expand_rows", {"BLOCK_R": 1, "BIAS": False, "FACTORS": False}), ("_expand_tiles", {"BLOCK_R": 16, "BIAS": False, "FACTORS": False}),
    ("_shrink_tiles", {"BLOCK_R": 16, "WIDE": True})])
def test_variants_compile(name, changed):
    assert build(name, "bf16", TARGETS["sm_80"], **changed).asm["cubin"]
