"""8-bit GaLore against galore_torch's class (on bitsandbytes' CPU kernel), and against Adam in a subspace around bitsandbytes' codes."""

import galore_torch
import pytest
import torch
from bitsandbytes import functional

from graftwork.modeling.blockwise import dynamic_map
from graftwork.optim import optimizer
from graftwork.registry import lookup

MOMENTS = (("exp_avg", True, "1"), ("exp_avg_sq", False, "2"))


def start(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(state, name, signed):
    return functional.dequantize_blockwise(state[f"{name}_codes"], absmax=state[f"{name}_absmax"], code=dynamic_map(signed), blocksize=256)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_equals_galore_torch_8bit(shape, monkeypatch):
    """Over three refreshes. Their codes are ours before each step: bitsandbytes' CPU kernel rounds ties and zeros another way."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)  # all that keeps the class from running on a CPU
    p = torch.nn.Parameter(start(shape))
    q = torch.nn.Parameter(p.detach().clone())
    options = {"rank": 8, "update_proj_gap": 3, "scale": 0.25}
    mine = optimizer("galore", [p], lr=1e-2, weight_decay=0.1, eps=1e-8, state="8bit", min_8bit_size=1, **options)
    theirs = galore_torch.GaLoreAdamW8bit([{"params": [q], "proj_type": "std", **options}], lr=1e-2, eps=1e-8, weight_decay=0.1,
                                          min_8bit_size=1)
    for step in range(8):
        p.grad = start(shape, 10 + step)
        q.grad = p.grad.clone()
        if step:
            for name, _, number in MOMENTS:
                theirs.state[q][f"state{number}"].copy_(mine.state[p][f"{name}_codes"])
                theirs.state[q][f"absmax{number}"].copy_(mine.state[p][f"{name}_absmax"])
        mine.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            q.copy_(p)
        for name, signed, number in MOMENTS:
            torch.testing.assert_close(theirs.state[q][f"absmax{number}"], mine.state[p][f"{name}_absmax"])
            other = functional.dequantize_blockwise(theirs.state[q][f"state{number}"], absmax=theirs.state[q][f"absmax{number}"],
                                                    code=dynamic_map(signed), blocksize=256)
            assert (decoded(mine.state[p], name, signed) - other).norm() < 0.02 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_step_is_adam_in_the_subspace_from_the_codes(moments):
    p = torch.nn.Parameter(start((40, 24)))
    mine = optimizer("galore", [p], lr=1e-2, rank=5, update_proj_gap=3, state="8bit", min_8bit_size=1, moments=moments, scale=0.5,
                     eps=1e-12)
    m = v = torch.zeros(40, 5, dtype=torch.float64)
    for step in range(7):
        p.grad = start((40, 24), 20 + step)
        g, w = p.grad.double(), p.detach().double()
        before = {k: t.clone() for k, t in mine.state[p].items()}
        mine.step()
        basis = mine.state[p]["projection_right"].double()
        age = step + 1
        if before:
            m, v = (decoded(before, name, signed).double() for name, signed, _ in MOMENTS)
            if step % 3 == 0:
                turn = before["projection_right"].double() @ basis.T
                m, v = {"keep": (m, v), "reset": (0 * m, 0 * v), "rotate": (m @ turn, v @ turn.square())}[moments]
                if moments != "keep":  # kept as codes between
                    m, v = (through_codes(x, signed) for x, (_, signed, _) in zip((m, v), MOMENTS))
            age = step % 3 + 1 if moments == "reset" else age
        low = g @ basis.T
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low.square()
        w = w - 1e-2 * 0.5 * (m / (1 - 0.9**age)) / (v / (1 - 0.999**age)).sqrt() @ basis
        # a tie of the rotated moments may be decided otherwise
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5 if moments != "rotate" else 2e-4)


def through_codes(x, signed):
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, functional.create_dynamic_map(signed), 256)
    return functional.dequantize_blockwise(codes, absmax=absmax.float(), code=dynamic_map(signed), blocksize=256).double()


def test_bytes_are_the_formula():
    """SmolLM2's up projection at rank 64: a r floats, 2 b r bytes, two maxima per block of 256; the card's figure."""
    size, (b, a, r) = lookup("optimizer", "galore").cls.state_bytes, (1536, 576, 64)
    assert size((b, a), torch.bfloat16, rank=r, state="8bit") == 4 * a * r + 2 * b * r + 8 * -(-b * r // 256) + 4
    assert size((a, b), torch.bfloat16, rank=r, state="8bit", state_dtype="bfloat16") == 2 * a * r + 2 * b * r + 8 * b * r // 256 + 4
    assert size((b, a), rank=2, state="8bit") == size((b, a), rank=2)  # 3072 numbers are too few
    assert size((b, a), rank=2, state="8bit", min_8bit_size=3072) < size((b, a), rank=2)
    assert size((5000,), rank=2, state="8bit") == 10000 + 8 * 20 + 4  # plain tensors are coded too
    p = torch.nn.Parameter(start((96, 64)))
    p.grad = start((96, 64), 1)
    built = optimizer("galore", [p], rank=48, state="8bit")
    built.step()
    assert sum(t.untyped_storage().nbytes() for t in built.state[p].values()) == size((96, 64), rank=48, state="8bit")


@pytest.mark.slow
@pytest.mark.parametrize("method, extra", [("apollo", 12), ("fira", 4 * 24 * 5 + 4)])
def test_apollo_and_fira_take_the_same_rule(method, extra):
    """From the same codes a step is that of float moments; bytes are 2 b r and the block maxima."""
    p, q = (torch.nn.Parameter(start((40, 24))) for _ in range(2))
    options = {"lr": 1e-2, "rank": 5, "update_proj_gap": 100}
    mine, dense = optimizer(method, [p], state="8bit", min_8bit_size=1, **options), optimizer(method, [q], **options)
    for step in range(4):
        p.grad = start((40, 24), 20 + step)
        q.grad = p.grad.clone()
        mine.step()
        dense.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            q.copy_(p)
            for name, signed, _ in MOMENTS:
                exact, coded = dense.state[q][name], decoded(mine.state[p], name, signed)
                assert 0 < (exact - coded).norm() < 0.03 * exact.norm()
                exact.copy_(coded)
            if "update_norm" in dense.state[q]:
                torch.testing.assert_close(mine.state[p]["update_norm"], dense.state[q]["update_norm"])
    counted = sum(t.numel() * t.itemsize for t in mine.state[p].values())
    assert counted == 2 * 200 + 8 + extra + 4 == type(mine).state_bytes((40, 24), config=mine.config)


@pytest.mark.slow
def test_trains_as_far_as_with_float_moments():
    ends = {}
    for state in ("dense", "8bit"):
        p, target = torch.nn.Parameter(torch.zeros(128, 64)), start((128, 64), 2)
        built = optimizer("galore", [p], lr=2e-2, rank=32, update_proj_gap=20, scale=1.0, state=state, min_8bit_size=0)
        for step in range(100):
            p.grad = p.detach() - target + 0.3 * start((128, 64), 100 + step)
            built.step()
        ends[state] = ((p.detach() - target).norm() / target.norm()).item()
    assert ends["8bit"] < 0.5 and abs(ends["8bit"] - ends["dense"]) < 0.03
