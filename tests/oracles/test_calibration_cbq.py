"""CBQ: the rounding against its closed form, the cut by brute force, windows against whole forwards, and less error by wider ones."""

import copy
from types import SimpleNamespace

import pytest
import torch

import tiny
from graftwork.compression.quantize import quantize
from graftwork.data.calibration import calibration_rows
from graftwork.errors import GraftworkError
from graftwork.modeling.models import load_model
from graftwork.planning.ledger import Ledger
from graftwork.registry import lookup, make_config
from graftwork.storage import Storage, apply_storage
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.cbq import CBQ, CBQCalibration, Rounding, reserved
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.calibration.windows import Windows

OUT, IN = 12, 70
KINDS = pytest.mark.parametrize("kind", [{}, {"zero_point": "float"}, {"symmetric": True}], ids=str)


def weights(seed=1):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def inputs(seed=0, tokens=300):
    mixing = torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)) / IN**0.5 * torch.linspace(0.1, 2, IN)
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed)) @ mixing


def config_of(bits=3, calibration="rtn", group=32, **options):
    return make_config("storage", f"int{bits}", group_size=group, calibration=calibration, **options)


def cbq(**options):
    return {"method": "cbq", "steps": 4, **options}


def kept(bits=3, storage=None, weight=None, **options):
    statistics = InputStatistics(IN, {"hessian"})
    statistics.add(inputs())
    config = config_of(bits, cbq(**options), **(storage or {}))
    return make_storage(weights() if weight is None else weight, f"int{bits}", config, statistics=statistics)


def student(kind=(), weight=None, bits=3, **options):
    quantizer = lookup("storage", f"int{bits}").cls.quantizer(config_of(bits, **dict(kind)), IN)
    return Rounding(weights() if weight is None else weight, quantizer, CBQ(**options))


@KINDS
def test_starts_at_the_weight_and_at_the_nearest_codes(kind):
    made, weight = student(kind), weights()
    soft, hard = made.dense(0.0), made.dense(1.0)
    levels = made.start["scale"].float() * 7
    units = made.base + made.quantizer.split(made.rounding())
    inside = made.quantizer.join((units >= 0) & (units <= 7))  # a symmetric format holds no 4
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(soft[inside], weight[inside], rtol=0, atol=2e-6 * float(levels.max()))
    plain = make_storage(weight, "int3", config_of(**kind))
    torch.testing.assert_close(hard, plain.dequantize(), rtol=0, atol=1e-6)
    found = made.found()
    assert torch.equal(made.quantizer.decode(found.codes, found.parameters), plain.dequantize())


@KINDS
@pytest.mark.slow
def test_closed_form_and_gradients(kind):
    made, generator = student(kind, rank=3), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for each in (*made.factors, made.log_scale):
            each.copy_(torch.randn(each.shape, generator=generator) * (0.02 if each is made.log_scale else 0.7))
    first, second, log_scale = (each.detach().double() for each in (*made.factors, made.log_scale))
    column = torch.arange(IN) // 32
    scale = made.start["scale"].double()
    zero = made.start["zero"].double() if "zero" in made.start else torch.full_like(scale, 4)
    units = weights().double() / scale[:, column] + zero[:, column]
    part = units - units.floor()
    v = -(1.2 / (part + 0.1) - 1).log() + first @ second
    h = (1.2 / (1 + (-v).exp()) - 0.1).clamp(0, 1)
    stepped = (scale * log_scale.exp()).to(made.start["scale"].dtype).double()
    for t, offset in ((0.3, h), (0.9, (h >= 0.5).double())):
        codes = (units.floor() + offset).clamp(0, 7)
        torch.testing.assert_close(made.dense(t).double(), (codes - zero[:, column]) * stepped[:, column], rtol=1e-4, atol=1e-4)
    beta = 2 + 18 * (0.5 - 0.3) / 0.4
    torch.testing.assert_close(made.penalty(0.3).double(), 0.1 * (1 - (2 * h - 1).abs() ** beta).sum(), rtol=1e-4, atol=1e-4)
    assert made.penalty(0.05) == 0 and made.penalty(0.5) == 0
    upstream = torch.randn(OUT, IN, generator=generator)
    (made.dense(0.9) * upstream).sum().backward()
    by_scale = torch.zeros_like(scale).index_add_(1, column, upstream * (codes - zero[:, column])) * scale * log_scale.exp()
    torch.testing.assert_close(made.log_scale.grad.double(), by_scale, rtol=1e-3, atol=1e-3)
    inside = (units.floor() + offset >= 0) & (units.floor() + offset <= 7) & (h > 0) & (h < 1)
    slope = 1.2 * (-v).exp() / (1 + (-v).exp()) ** 2
    by_v = upstream * stepped[:, column] * slope * inside
    torch.testing.assert_close(made.factors[0].grad.double(), by_v @ second.T, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(made.factors[1].grad.double(), first.T @ by_v, rtol=1e-3, atol=2e-3)
    found = made.found()
    assert torch.equal(made.quantizer.decode(found.codes, found.parameters), made.dense(1.0))


def test_the_cut_by_brute_force():
    generator = torch.Generator().manual_seed(3)
    for planted in ((6.0, 6.5, 9.0), (4.0,), ()):
        values = torch.cat([torch.randn(401, generator=generator).abs(), torch.tensor(planted)])
        ordered = sorted(values.tolist())
        low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.75))
        candidates = [v for v in ordered if v > high + 1.5 * (high - low)]
        measures = []
        for k in range(1, len(candidates)):
            mean = sum(candidates[:k]) / k
            measures.append((candidates[k] - candidates[k - 1]) ** 2 - sum((v - mean) ** 2 for v in candidates[:k]) / k)
        wanted = candidates[measures.index(max(measures))] if measures else ordered[-1]
        assert float(reserved(values)) == pytest.approx(wanted)
    assert float(reserved(torch.ones(5))) == 1


@pytest.mark.slow
def test_single_matrices_and_every_option():
    weight, other = weights(), inputs(9)
    plain = {bits: make_storage(weight, f"int{bits}", config_of(bits)) for bits in (2, 3)}

    def error(stored):
        return float(((stored.dequantize() - weight) @ other.T).square().mean())

    for bits, part in ((3, 0.9), (2, 0.85)):
        found = kept(bits, steps=100)
        assert error(found) < part * error(plain[bits])
    codes = [lookup("storage", "int3").cls.integers(each, each.leaves(), slice(0, OUT))[0] for each in (kept(steps=100), plain[3])]
    moved = codes[0] != codes[1]
    assert 0.005 < moved.float().mean() < 0.5 and (codes[0] - codes[1]).abs().max() == 1  # a minority, by one code
    still = kept(steps=20, lr_rounding=0, lr_scale=0).leaves()
    assert all(torch.equal(still[name], value) for name, value in plain[3].leaves().items())
    scales, rounding = kept(steps=20, lr_rounding=0).leaves(), kept(steps=20, lr_scale=0).leaves()
    assert torch.equal(scales["codes"], still["codes"]) and not torch.equal(scales["scale"], still["scale"])
    assert torch.equal(rounding["scale"], still["scale"]) and not torch.equal(rounding["codes"], still["codes"])
    base = kept(steps=20).leaves()
    for changed in ({"rank": 1}, {"rank": 0}, {"regularize": 3.0}, {"steps": 60}):
        again = kept(**{"steps": 20, **changed}).leaves()
        assert any(not torch.equal(again[name], base[name]) for name in base), changed
    far = weight.clone()
    far[2, 3] = 12
    cut = [float(kept(weight=far, steps=1, truncate=truncate, lr_scale=0, lr_rounding=0).dequantize()[2, 3]) for truncate in (False, True)]
    made = [student(weight=far, truncate=truncate).start["scale"][2, 0] for truncate in (False, True)]
    assert made[1] < 0.6 * made[0] and cut[0] > 11
    assert kept().bits_per_weight == plain[3].bits_per_weight


# -- windows of a model ------------------------------------------------------------------------------------------------
def model_of(**more):
    return tiny.llama(**{"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2, **more})


def batches(count=2, seed=10, rows=4, length=16):
    return [{"input_ids": tiny.tokens(rows, length, seed=seed + i)} for i in range(count)]


def into(model, data, bits=2, storage=None, **options):
    return apply_storage(model, config_of(bits, cbq(**options), 16, **(storage or {})), batches=data, notes=[])


def codes_of(model):
    return {name: module.codes for name, module in model.named_modules() if isinstance(module, Storage)}


@torch.no_grad()
def outputs(model, data, block=-1):
    found = []
    handle = model.model.layers[block].register_forward_hook(lambda m, args, out: found.append(out if torch.is_tensor(out) else out[0]))
    for batch in data:
        model(**batch)
    handle.remove()
    return found


def test_where_windows_begin_and_end():
    for count, window, wanted in ((4, (2, 1), [(0, 1), (1, 2), (2, 3)]), (4, (1, 0), [(0, 0), (1, 1), (2, 2), (3, 3)]),
                                  (5, (4, 2), [(0, 3), (2, 4)]), (2, (3, 1), [(0, 1)]), (5, (2, 0), [(0, 1), (2, 3), (4, 4)])):
        run = SimpleNamespace(owners=[7] * 3 + [9] * count)  # an encoder of three blocks before
        made = Windows(None, run, None, [], config_of(), SimpleNamespace(config=SimpleNamespace(window=window)), None)
        assert [(i, made._last(i + 3) - 3) for i in range(count) if made._last(i + 3) is not None] == wanted
    for wrong in ((1, 1), (2, 3), (2, -1)):
        with pytest.raises(GraftworkError, match="overlap"):
            config_of(2, cbq(window=wrong))


@pytest.mark.slow
def test_inputs_and_targets_are_those_of_whole_forwards(monkeypatch):
    seen, real = [], CBQCalibration.distances

    def watched(self, output, target):
        seen.append((output.detach().clone(), target.clone()))
        return real(self, output, target)

    monkeypatch.setattr(CBQCalibration, "distances", watched)
    data, dense = batches(), model_of()
    data[0]["attention_mask"] = torch.ones(4, 16, dtype=torch.int64)
    data[0]["attention_mask"][0, 9:] = 0
    model = into(copy.deepcopy(dense), data, window=(2, 0), steps=6)
    nearest = apply_storage(copy.deepcopy(dense), config_of(2, "rtn", 16))
    assert len(seen) == 2 * (2 + 6 + 2)
    for start, last in ((0, 1), (10, 3)):
        half = copy.deepcopy(model)
        for i in range(last - 1, 4):
            half.model.layers[i] = nearest.model.layers[i]
        for number, (target, output) in enumerate(zip(outputs(dense, data, last), outputs(half, data, last))):
            real_rows = torch.ones(4, 16, dtype=torch.bool) if number else data[0]["attention_mask"].bool()
            torch.testing.assert_close(seen[start + number][1], target[real_rows], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen[start + number][0], output[real_rows], rtol=1e-3, atol=1e-3)
        ended = copy.deepcopy(model)
        for number, output in enumerate(outputs(ended, data, last)):
            real_rows = torch.ones(4, 16, dtype=torch.bool) if number else data[0]["attention_mask"].bool()
            torch.testing.assert_close(seen[start + 8 + number][0], output[real_rows], rtol=1e-3, atol=1e-3)
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(nearest.state_dict())


@pytest.mark.slow
def test_a_wider_window_is_better():
    """MLPs alone, for time. On the calibration data, since 60 steps on few tokens say little of others."""
    attention = {"skip_modules": ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"]}
    data, dense = batches(8, 10, 8, 24), model_of(initializer_range=0.1)
    wanted = torch.cat(outputs(dense, data))

    def error(model):
        return float((torch.cat(outputs(model, data)) - wanted).square().mean() / wanted.square().mean())

    plain = error(apply_storage(model_of(initializer_range=0.1), config_of(2, "rtn", 16, **attention)))
    narrow, wide = (error(into(model_of(initializer_range=0.1), data, storage=attention, window=window, steps=60))
                    for window in ((1, 0), (2, 1)))
    assert narrow < 0.5 * plain and wide < 0.97 * narrow


@pytest.mark.slow
def test_windows_read_their_options_and_put_back_what_got_worse():
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    base = codes_of(into(model_of(**small), batches(), steps=8))
    for changed in ({"window": (1, 0)}, {"kl": 0.0}, {"kl": 50.0}):
        again = codes_of(into(model_of(**small), batches(), **{"steps": 8, **changed}))
        assert any(not torch.equal(again[name], base[name]) for name in base), changed
    same = codes_of(into(model_of(**small), batches(), steps=8))
    assert all(torch.equal(same[name], base[name]) for name in base)
    rounded = codes_of(into(model_of(**small), batches(), steps=8, storage={"activations": "int4"}))
    assert any(not torch.equal(rounded[name], base[name]) for name in base)
    nearest = codes_of(apply_storage(model_of(**small), config_of(2, "rtn", 16)))
    worse = into(model_of(**small), batches(), steps=3, lr_rounding=1e3, lr_scale=3.0)
    assert all(torch.equal(codes, nearest[name]) for name, codes in codes_of(worse).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_other_architectures(name):
    model, notes = tiny.ALL[name](), []
    apply_storage(model, config_of(3, cbq(steps=12), 16), batches=batches(), notes=notes)
    nearest = apply_storage(tiny.ALL[name](), config_of(3, "rtn", 16))
    moved = [n for n, codes in codes_of(model).items() if not torch.equal(codes, codes_of(nearest)[n])]
    assert len(moved) > len(codes_of(model)) / 2 and not [note for note in notes if "alone" in note]
    half = apply_storage(tiny.llama(dtype=torch.bfloat16), config_of(3, cbq(), 16), batches=batches())
    assert torch.isfinite(half(**batches()[0]).logits).all() and half.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.slow
def test_one_window_is_in_memory_at_a_time(tmp_path):
    given = dict(storage={"method": "int3", "group_size": 16, "calibration": cbq(steps=1)}, samples=1, length=16,
                 data=[f"the answer to question {i} is {i * 7 % 31}." for i in range(60)])
    peaks = []
    for layers in (3, 6):
        folder = tiny.save(tiny.llama(num_hidden_layers=layers), tmp_path / f"m{layers}")
        with Ledger(device="cpu") as ledger:
            quantize(folder, tmp_path / f"q{layers}", **given)
        peaks.append(ledger.peak_bytes)
    block = sum(p.numel() * p.itemsize for p in tiny.llama().model.layers[0].parameters())
    assert peaks[1] < peaks[0] + block / 4


@pytest.mark.slow
def test_blocks_that_cannot_be_run_alone_are_taken_map_by_map():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = torch.nn.Embedding(tiny.VOCAB, 16), torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in [*self.blocks] * 2:
                x = torch.tanh(block(x))
            return x

    torch.manual_seed(3)
    model, notes = Twice(), []
    dense, seen = copy.deepcopy(model), InputStatistics(16, {"hessian"})
    apply_storage(model, config_of(2, cbq(), 16), batches=batches(), notes=notes)
    assert len(notes) == 1 and "alone" in notes[0]
    dense.blocks[0].register_forward_pre_hook(lambda m, args: seen.add(args[0]))
    for batch in batches():
        dense(**batch)
    alone = make_storage(dense.blocks[0].weight, "int2", config_of(2, cbq(), 16), statistics=seen)
    assert torch.equal(alone.codes, model.blocks[0].codes) and torch.equal(alone.scale, model.blocks[0].scale)


@pytest.mark.slow
def test_a_folder_and_a_kill(tmp_path):
    folder = tiny.save(tiny.llama(num_hidden_layers=3), tmp_path / "m")
    storage = {"method": "int3", "group_size": 16, "calibration": cbq()}
    given = {"storage": storage, "data": [f"the answer to question {i} is {i * 7 % 31}." for i in range(60)], "samples": 4, "length": 16}
    quantize(folder, tmp_path / "whole", **given)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        quantize(folder, tmp_path / "killed", progress=stop, **given)
    report = quantize(folder, tmp_path / "killed", **given)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in ("whole", "killed")]
    assert files[0] == files[1] and report.resumed == 0
    rows = calibration_rows(given["data"], tiny.tokenizer(), samples=4, length=16)
    expected = apply_storage(load_model(folder)[0], make_config("storage", **{k: v for k, v in storage.items() if k != "method"},
                                                                name="int3"), batches=rows.batches)
    found = load_model(tmp_path / "whole")[0]
    assert all(torch.equal(codes, codes_of(found)[name]) for name, codes in codes_of(expected).items())
    assert found.graft_storage == expected.graft_storage
