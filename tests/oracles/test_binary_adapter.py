"""Binary adapters: the published levels, a quantizer by brute force in float64, packed bytes by the formula, exact reloads."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import torch.nn.functional as F

import graftwork
import tiny
from adapter_support import attach, close, fill, output
from graftwork.adapters import _binary
from graftwork.errors import ArtifactError, UsageError
from training_support import completions, folder, recipe, run

IDS = tiny.tokens(2, 7)
METHODS = ["binary_adapter", "binary_lora"]
LEVELS = {1: [0.6745], 2: [0.3778, 1.2657], 4: [0.1056, 0.3190, 0.5401, 0.7752, 1.0340, 1.3331, 1.7077, 2.2655]}


def brute_force(w, bits):
    """w^ in float64: the nearest of the published levels, by comparison with all."""
    w = w.double()
    mu, sigma = w.mean(), (w - w.mean()).square().sum().div(w.numel() - 1).sqrt()
    places = torch.tensor([-v for v in reversed(_binary.levels(bits)[2**bits // 2:])] + list(_binary.levels(bits)[2**bits // 2:]),
                          dtype=torch.float64)
    z = (w - mu) / (sigma + 1e-5)
    return places[(z.unsqueeze(-1) - places).abs().argmin(-1)] * sigma + mu


# -- the quantizer ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_the_published_ones_and_medians(bits):
    found = torch.tensor(_binary.levels(bits), dtype=torch.float64)
    assert torch.allclose(found, torch.tensor([-v for v in reversed(LEVELS[bits])] + LEVELS[bits]).double(), atol=6e-5)
    edges = torch.cat([torch.tensor([-torch.inf]), (found[1:] + found[:-1]) / 2, torch.tensor([torch.inf])])
    mass = torch.special.ndtr(edges.double())
    torch.testing.assert_close(torch.special.ndtr(found), (mass[1:] + mass[:-1]) / 2)


@pytest.mark.parametrize("bits", LEVELS)
def test_quantizer_and_its_gradient(bits):
    w = (torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.003).requires_grad_()
    got = _binary.quantize(w, bits)
    close(got, brute_force(w.detach(), bits), 1e-5)
    assert len(got.unique()) <= 2**bits * 2  # rounding of the sums may split a level in two
    g = torch.randn(7, 33, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (mine,) = torch.autograd.grad((got * g).sum(), w)
    v = w.detach().double().requires_grad_()
    z = (v - v.mean()) / (v.std() + 1e-5)
    places = torch.tensor(_binary.levels(bits), dtype=torch.float64)
    q = places[(z.detach().unsqueeze(-1) - places).abs().argmin(-1)]
    # dw^ = dq sigma + q dsigma + dmu with dq = dz, written out
    surrogate = (z * v.std().detach()) + q * v.std() + v.mean()
    (wanted,) = torch.autograd.grad((surrogate * g).sum(), v)
    close(mine, wanted, 1e-4)


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("shape", [(8,), (3, 5), (1, 1), (6, 64)])
def test_packing_is_exact_and_little_endian(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(3))
    packed = _binary.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() + 8 == _binary.stored_bytes(codes.numel(), bits)
    assert torch.equal(_binary.unpack(packed, bits, codes.shape), codes)
    word = int.from_bytes(bytes(packed.tolist()), "little")
    assert [(word >> (bits * i)) & (2**bits - 1) for i in range(codes.numel())] == codes.flatten().tolist()


# -- the adapters ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("position", ["serial", "parallel"])
@torch.no_grad()
def test_network_in_float64(bits, position):
    graft = attach(tiny.gpt2(), "binary_adapter", r=5, bits=bits, position=position, scaling=0.7)
    for name, adapter in graft.adapters.items():
        base = graft.base_of(graft.sites[name])
        x = torch.randn(3, adapter.in_features, generator=torch.Generator().manual_seed(2))
        y = x.double() @ base.weight().double().T + base.bias.double()
        D, U = brute_force(adapter.down, bits), brute_force(adapter.up, bits)
        close(adapter(x, base), y + 0.7 * F.relu((y if position == "serial" else x.double()) @ D.T) @ U.T, 1e-5)


@pytest.mark.parametrize("bits", LEVELS)
@torch.no_grad()
def test_factors_are_those_of_a_lora(bits):
    graft = attach(tiny.llama(), "binary_lora", r=5, bits=bits, scaling=0.7)
    for name, change in graft.delta_weights().items():
        adapter = graft.adapters[name]
        close(change, 0.7 * brute_force(adapter.B, bits) @ brute_force(adapter.A, bits), 1e-5)
    twin = graftwork.attach(tiny.llama(), "lora", r=5)
    for name, (B, A) in graft.to_lora()[0].items():
        twin.adapters[name].lora_B.copy_(B), twin.adapters[name].lora_A.copy_(A)
    close(output(graft.model, IDS), output(twin.model, IDS), 1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_start_is_small_but_not_zero(method):
    model, before = tiny.llama(), output(tiny.llama(), IDS)
    graftwork.attach(model, method, r=8)
    moved = (output(model, IDS) - before).norm() / before.norm()
    assert 0 < moved < 0.02


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_option_changes_the_output(method):
    def logits(**options):
        return output(attach(tiny.llama(), method, **{"r": 6, "bits": 1, **options}).model, IDS)

    plain = logits()
    own = [{"activation": "tanh"}, {"position": "parallel"}] if method == "binary_adapter" else []
    for options in ({"r": 3}, {"bits": 2}, {"bits": 4}, {"scaling": 2.0}, {"rank_pattern": {"down_proj": 2}},
                    {"target_modules": ["o"]}, *own):
        assert (logits(**options) - plain).abs().max() > 1e-3, options


# -- bytes ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("r", [8, 3])
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_file_has_the_bytes_of_the_formula(method, bits, r, tmp_path):
    graft = attach(tiny.llama(), method, r=r, bits=bits, target_modules=["o_proj", "down_proj"])
    graft.save(tmp_path / "saved")
    content = (tmp_path / "saved" / "graft.safetensors").read_bytes()
    data = len(content) - 8 - struct.unpack("<Q", content[:8])[0]
    widths = [tiny.HIDDEN, tiny.HIDDEN if method == "binary_adapter" else tiny.FFN]  # what is read at o_proj and down_proj
    numels = [n for width in widths for n in (r * width, tiny.HIDDEN * r)] * tiny.LAYERS
    assert data == sum(-(-n * bits // 8) + 8 for n in numels) == sum(_binary.stored_bytes(n, bits) for n in numels)
    assert graft.parameter_count() == sum(numels)
    assert data < 4 * sum(numels) * bits / 32 + 9 * len(numels)


@pytest.mark.slow
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("method", METHODS)
def test_reload_is_exact_and_packed_and_goes_on(method, bits, tmp_path):
    model = tiny.llama()
    graft = attach(model, method, r=5, bits=bits)
    graft.save(tmp_path / "saved")
    with torch.no_grad():
        learned = output(model, IDS)
        for trainable in (False, True):
            again = tiny.llama()
            loaded = graftwork.attach_saved(again, tmp_path / "saved", trainable=trainable)
            if not trainable:
                assert torch.equal(output(again, IDS), learned)
                kept = sum(p.numel() * p.element_size() for _, p in loaded.named_parameters(trainable=False))
                assert kept == sum(_binary.stored_bytes(p.numel(), bits) for p in graft.parameters())
                loaded.save(tmp_path / "copy")
                files = [(tmp_path / f / "graft.safetensors").read_bytes() for f in ("saved", "copy")]
                assert files[0] == files[1]
    close(output(again, IDS), learned, 1e-5)  # the codes survive, mean and deviation are rounded once
    assert loaded.parameter_count() == graft.parameter_count()
    names = [n for n, _ in loaded.named_parameters()]
    assert names == [n for n, _ in graft.named_parameters()]
    output(again, IDS).square().mean().backward()
    before = output(again, IDS).detach()
    torch.optim.Adam(loaded.parameters(), lr=0.05).step()
    assert (output(again, IDS) - before).abs().max() > 1e-4


@torch.no_grad()
def test_packed_rows_and_latent_rows_in_one_bank(tmp_path):
    for method in METHODS:
        model = tiny.llama()
        graft = attach(model, method, name="a", r=5)
        graft.save(tmp_path / method)
        attach(model, method, name="b", seed=5, r=2, bits=4)
        graftwork.attach_saved(model, tmp_path / method, name="c")
        with graftwork.routing(model, ["a", "b", "c"]):
            mixed = output(model, IDS[:1].expand(3, -1))
        close(mixed[2], mixed[0], 1e-6)
        assert (mixed[1] - mixed[0]).abs().max() > 1e-2


@torch.no_grad()
def test_damaged_codes_are_refused(tmp_path):
    graft = attach(tiny.llama(), "binary_lora", r=5)
    graft.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "graft.json").read_text())
    card["config"]["bits"] = 2
    from graftwork.artifact import seal

    card["checksum"] = seal(card)
    (tmp_path / "saved" / "graft.json").write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="does not fit"):
        graftwork.attach_saved(tiny.llama(), tmp_path / "saved")


# -- learning ---------------------------------------------------------------------------------------------------------------
def learn(method, steps=30, **options):
    model, ids = tiny.llama(), tiny.tokens(6, 10)
    graft = graftwork.attach(model, method, r=8, **options)
    optimizer = torch.optim.Adam(graft.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model(ids, labels=ids).loss.item(), tiny.llama()(ids, labels=ids).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("method, plain, options", [("binary_lora", "lora", {}), ("binary_adapter", "bottleneck", {"activation": "gelu"})])
def test_one_bit_keeps_more_than_half_of_the_gain(method, plain, options):
    (binary, start), (full, _) = learn(method, bits=1, **options), learn(plain, **options)
    assert full < start and (start - binary) > 0.5 * (start - full), (start, full, binary)


@pytest.mark.slow
def test_a_recipe_is_trained_and_continued(tmp_path):
    model, file = folder(tmp_path), completions(tmp_path / "train.jsonl")
    document = recipe(model, file, tmp_path / "out", adapter={"method": "binary_lora", "r": 4}, train={"max_steps": 2})
    planned = graftwork.plan(document, estimate_time=False)
    run(document)
    card = json.loads((tmp_path / "out" / "graft" / "graft.json").read_text())
    assert card["parameters"] == planned.trained
    more = recipe(model, file, tmp_path / "more", adapter={"from": str(tmp_path / "out" / "graft")}, train={"max_steps": 2})
    assert graftwork.plan(more, estimate_time=False).trained == planned.trained
    run(more)
    sizes = [(tmp_path / f / "graft" / "graft.safetensors").stat().st_size for f in ("out", "more")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    with pytest.raises(UsageError, match="bits"):
        graftwork.attach(tiny.llama(), method, bits=3)
    with pytest.raises(UsageError, match="r=65"):
        graftwork.attach(tiny.llama(), method, r=65)
    graft = fill(graftwork.attach(tiny.llama(), method, r=4))
    if method == "binary_adapter":
        with pytest.raises(graftwork.GraftworkError, match="cannot be merged"):
            graft.merge()
