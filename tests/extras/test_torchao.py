"""fp4 with the scales of MXFP4 and NVFP4 against torchao (`make test-ao`: every load of a model would import it, so it has an
environment of its own)."""

import pytest
import torch

pytest.importorskip("torchao", reason="make test-ao")

from graftwork.registry import make_config
from graftwork.storage._packing import unpack
from graftwork.storage.base import make_storage


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(weight, **options):
    return make_storage(weight, "fp4", make_config("storage", "fp4", **options))


def test_equals_torchao():
    from torchao.prototype.mx_formats import mx_tensor as mx
    from torchao.prototype.mx_formats import nvfp4_tensor as nv

    weight = normal(16, 128, seed=1)
    stored = kept(weight, scale="e8m0", group_size=32)
    scale, packed = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    assert torch.equal(stored.leaves()["scale"], scale.view(torch.uint8).view(16, -1))
    assert torch.equal(stored.leaves()["codes"], packed.view(torch.uint8).view(16, -1))
    outer = nv.per_tensor_amax_to_scale(weight.abs().max())
    scale, packed = nv.nvfp4_quantize(weight, 16, outer)
    stored = kept(weight, scale="e4m3", group_size=16)
    assert stored.leaves()["outer_scale"].item() == pytest.approx(outer.item())
    assert torch.equal(stored.leaves()["scale"], scale.view(torch.uint8).view(16, -1))
    same = unpack(stored.leaves()["codes"], 128, 4) == unpack(packed.view(torch.uint8).view(16, -1), 128, 4)
    assert same.float().mean() > 0.995  # ties after a division in another order
