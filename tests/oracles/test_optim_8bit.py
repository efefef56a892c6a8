"""8-bit AdamW: codes against bitsandbytes' quantize_blockwise, steps against AdamW around bitsandbytes' functions."""

import pytest
import torch
from bitsandbytes import functional

from graftwork.modeling.blockwise import _midpoints_below, dequantize_blockwise, dynamic_map, quantize_blockwise
from graftwork.optim import optimizer
from graftwork.registry import lookup


def values(size, signed, seed=0):
    """Over eight decades, as moments are, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10 ** (-8 * torch.rand(size, generator=generator))
    x = x * (torch.rand(size, generator=generator) > 0.05)
    return x if signed else x.square()


def theirs(x, signed):
    """Codes and block maxima. float64 goes to the exact code of bitsandbytes; its float32 CPU code rounds to a grid first."""
    return torch.ops.bitsandbytes.quantize_blockwise(x.double(), functional.create_dynamic_map(signed), 256)


@pytest.mark.parametrize("signed", [True, False])
def test_maps_and_codes_equal_bitsandbytes(signed):
    book = dynamic_map(signed)
    assert torch.equal(book, functional.create_dynamic_map(signed)) and torch.equal(book, book.unique())
    assert book.numel() == 256 and 0 in book and 1 in book
    for size in (1, 255, 256, 257, 5000):
        x = values(size, signed)
        codes, scale = quantize_blockwise(x, signed)
        expected, absmax = theirs(x, signed)
        assert torch.equal(scale, absmax)
        unit = x / scale.repeat_interleave(256)[:size]
        differ = codes != expected
        distance = (unit - book[codes.long()]).abs() - (unit - book[expected.long()]).abs()
        assert differ.float().mean() < 1e-3 and torch.all(distance[differ].abs() < 1e-7)  # ties
        assert torch.equal(dequantize_blockwise(expected, scale, signed), functional.dequantize_blockwise(
            expected, absmax=scale, code=book, blocksize=256))
        gridded, state = functional.quantize_blockwise(x, code=book, blocksize=256)
        assert torch.equal(quantize_blockwise(x, signed, grid=True)[0], gridded) and torch.equal(scale, state.absmax)
        assert torch.all(dequantize_blockwise(codes, scale, signed)[x == 0] == 0)


def test_empty_blocks_shapes_and_the_grid():
    x = torch.zeros(3, 200)
    x[0, 0] = 2.0
    codes, scale = quantize_blockwise(x)
    assert codes.shape == (3, 200) and scale.tolist() == [2.0, 0.0, 0.0]
    assert torch.equal(dequantize_blockwise(codes, scale), x)
    small = torch.tensor([1.0, 1e-6])
    exact, raised = (dequantize_blockwise(*quantize_blockwise(small, grid=g))[1].item() for g in (False, True))
    assert abs(exact - 1e-6) < 6e-7 and abs(raised - 2.1e-5) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_equal_adam_around_bitsandbytes(decay):
    start = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    p = torch.nn.Parameter(start.clone())
    mine = optimizer("adamw8bit", [p], lr=1e-2, weight_decay=decay, betas=(0.8, 0.95), min_8bit_size=1)
    w, m, v = start.double(), torch.zeros(40, 30, dtype=torch.float64), torch.zeros(40, 30, dtype=torch.float64)
    for t in range(1, 7):
        p.grad = values((40, 30), True, seed=t)
        before = {k: x.clone() for k, x in mine.state[p].items()}
        mine.step()
        if before:  # from our own codes: a tie decided otherwise must not add up
            m, v = (functional.dequantize_blockwise(before[f"{n}_codes"], absmax=before[f"{n}_absmax"], code=dynamic_map(s),
                                                    blocksize=256).double() for n, s in (("exp_avg", True), ("exp_avg_sq", False)))
        g = p.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g.square()
        w = w * (1 - 1e-2 * decay) - 1e-2 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5)
        w = p.detach().double()
        for name, moment, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, absmax = theirs(moment.float(), signed)
            assert (codes.flatten() != mine.state[p][f"{name}_codes"].flatten()).float().mean() < 5e-3
            torch.testing.assert_close(mine.state[p][f"{name}_absmax"], absmax)


@pytest.mark.slow
def test_moves_as_far_as_float32_adamw_on_a_noisy_quadratic():
    ends = {}
    for name in ("adamw", "adamw8bit"):
        p = torch.nn.Parameter(torch.zeros(128, 64))
        target = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
        built = optimizer(name, [p], lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        for _ in range(100):
            p.grad = p.detach() - target + 0.3 * torch.randn(128, 64, generator=generator)
            built.step()
        ends[name] = p.detach()
    assert abs(ends["adamw8bit"].norm() / ends["adamw"].norm() - 1) < 0.03
    assert (ends["adamw8bit"] - ends["adamw"]).norm() < 0.05 * ends["adamw"].norm()


def test_small_tensors_are_adamw_and_bytes_are_exact():
    size = lookup("optimizer", "adamw8bit").cls.state_bytes
    assert size((32768,)) == 66560 + 4 == size((128, 256), torch.bfloat16) == size((128, 256), torch.float64)
    assert size((4095,)) == 8 * 4095 + 4 and size((4096,)) == 2 * 4096 + 8 * 16 + 4
    assert size((100,), torch.bfloat16, state_dtype="bfloat16") == 404 and size((100,), min_8bit_size=100) == 200 + 8 + 4
    finals = []
    for name in ("adamw", "adamw8bit"):
        p = torch.nn.Parameter(torch.ones(20, 10))
        built = optimizer(name, [p], lr=1e-2, weight_decay=0.1)
        for step in range(4):
            p.grad = torch.randn(20, 10, generator=torch.Generator().manual_seed(step))
            built.step()
        finals.append(p.detach())
    torch.testing.assert_close(*finals, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_of_intervals_is_a_search_of_the_midpoints(signed):
    book = dynamic_map(signed)
    midpoints = (book[:-1] + book[1:]) * 0.5
    far, edges = torch.tensor(torch.inf), torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    noise = torch.randn((8, 10_000), generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * 10.0 ** -torch.arange(8.0)[:, None]
    x = torch.cat([midpoints, torch.nextafter(midpoints, far), torch.nextafter(midpoints, -far), book, edges, noise.flatten()])
    assert torch.equal(_midpoints_below(x, signed), torch.bucketize(x, midpoints).to(torch.uint8))
