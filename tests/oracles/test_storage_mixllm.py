"""MixLLM: its rows are those of the integer formats; salience against plain autograd; the ranking over a whole model through the walk;
integer products on the leaves; bits a weight by formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import tiny
from graftwork.errors import UsageError
from graftwork.registry import lookup, make_config
from graftwork.storage import Storage, apply_storage
from graftwork.storage._groups import GroupQuantizer
from graftwork.storage._packing import unpack
from graftwork.storage.base import make_storage, places
from graftwork.storage.calibration.base import calibration_of
from graftwork.storage.calibration.sensitivity import row_salience, top_rows
from graftwork.storage.calibration.statistics import InputStatistics
from graftwork.storage.intk import IntGrid
from graftwork.storage.mixllm import quantizer


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(x):
    found = InputStatistics(x.shape[1], ("hessian", "mean_abs"))
    found.add(x)
    return found


def config_of(**options):
    return make_config("storage", "mixllm", **{"group_size": 32, **options})


@pytest.mark.parametrize("calibration", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_rows_are_those_of_the_integer_formats(calibration):
    weight, x = normal(21, 70), normal(200, 70, seed=1) @ normal(70, 70, seed=2) / 8
    statistics, config = statistics_of(x), config_of(wide=0.3, calibration=calibration)
    statistics.wide_rows = torch.zeros(21, dtype=torch.bool)
    statistics.wide_rows[[0, 3, 4, 20]] = True
    stored = make_storage(weight, "mixllm", config, statistics=statistics)
    assert torch.equal(stored.wide_rows(), statistics.wide_rows)
    narrow = make_storage(weight, "int4", make_config("storage", "int4", group_size=32, calibration=calibration), statistics=statistics)
    grid = GroupQuantizer(IntGrid(8, True, True, torch.float16), 32, 70)
    found = calibration_of(config.calibration).calibrate(weight, grid, statistics)
    expected = torch.where(statistics.wide_rows[:, None], grid.decode(found.codes, found.parameters), narrow.dequantize())
    dense = stored.dequantize()
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=1e-5)
    for first, stop in ((0, 21), (0, 5), (3, 4), (4, 21), (5, 19)):
        assert torch.equal(stored.decode(stored.leaves(), slice(first, stop)), dense[first:stop])
    assert torch.equal(stored.rows(torch.tensor([20, 0, 7])), dense[[20, 0, 7]])


def test_rows_of_one_matrix_are_ranked_by_their_error():
    weight, x = normal(40, 64), normal(200, 64, seed=1) * torch.linspace(0.1, 3, 64)
    error = quantizer(config_of(), 64, False).nearest(weight) - weight
    own, only_abs = statistics_of(x), InputStatistics(64, ("mean_abs",))
    only_abs.add(x)
    for statistics, score in ((own, (x @ error.T).square().mean(0)), (only_abs, error.abs() @ x.abs().mean(0)), (None, error.norm(dim=1))):
        with pytest.warns(UserWarning, match="no calibration data") if statistics is None else torch.no_grad():
            stored = make_storage(weight, "mixllm", config_of(), statistics=statistics)
        assert sorted(stored.wide_rows().nonzero()[:, 0].tolist()) == sorted(score.topk(4).indices.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_salience_is_that_of_plain_autograd(name):
    model = tiny.ALL[name]()
    next(model.parameters()).requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    config = config_of(group_size=16)
    batch = {"input_ids": tiny.tokens(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    batch["attention_mask"][1, 7:] = 0

    def quantized(weight):
        return quantizer(config, weight.shape[1], False).nearest(weight)

    got = row_salience(model, places(model, config), [batch], quantized)
    assert all(p.grad is None and p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())

    plain = copy.deepcopy(model).requires_grad_(True)
    expected = dict.fromkeys(got, 0.0)
    for ids in (batch["input_ids"][:1], batch["input_ids"][1:, :7]):
        plain.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        for place in places(plain, config):
            parameter = getattr(place.module, place.attribute or "weight")
            grad = parameter.grad if place.expert is None else parameter.grad[place.expert]
            grad = grad.T if isinstance(place.module, Conv1D) else grad
            weight = place.product.dense().detach()
            a = (grad * (quantized(weight) - weight)).sum(1).double()
            expected[place.name] = expected[place.name] + (a + a.square() / 2).abs()
    for each, value in got.items():
        torch.testing.assert_close(value, expected[each], atol=1e-7, rtol=2e-3)
    assert any(value.max() > 1e-5 for value in got.values())


@pytest.mark.slow
def test_salience_of_one_row_is_the_change_of_the_loss():
    model, ids = tiny.llama().double(), tiny.tokens(1, 12)
    place = places(model, config_of())[1]
    change = 1e-3 * normal(*place.product.dense().shape, seed=4).double()
    got = row_salience(model, [place], [{"input_ids": ids}], lambda w: w + change.float())[place.name]
    row = int(got.argmax())
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            place.module.weight[row] += sign * change[row]
            losses.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]))
            place.module.weight[row] -= sign * change[row]
    assert float(got[row]) == pytest.approx(abs(float(losses[0] - losses[1]) / 2), rel=0.02)


def test_top_rows_of_all_sites():
    found = top_rows({"a": torch.tensor([1.0, 5, 2]), "b": torch.tensor([4.0, 3, 0, 0])}, 3 / 7)
    assert {n: m.tolist() for n, m in found.items()} == {"a": [False, True, False], "b": [True, True, False, False]}


@pytest.mark.slow
def test_a_whole_model_through_the_walk(tmp_path):
    model, batches = tiny.llama(), [{"input_ids": tiny.tokens(3, 20, seed=s)} for s in range(2)]
    config = config_of(group_size=16, calibration="gptq")
    expected = lookup("storage", "mixllm").cls.prepare(model, config, batches)
    apply_storage(model, config, batches=batches)
    stored = {n: m for n, m in model.named_modules() if isinstance(m, Storage)}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(m.wide_rows(), expected[n]["wide_rows"]) for n, m in stored.items())
    parts = [float(m.wide_rows().float().mean()) for m in stored.values()]
    rows = sum(m.out_features for m in stored.values())
    assert sum(int(m.wide_rows().sum()) for m in stored.values()) == round(0.1 * rows) and max(parts) > 0.15 > 0.05 > min(parts)
    own = apply_storage(tiny.llama(), config_of(group_size=16, calibration="gptq", salience="local"), batches=batches)
    assert {round(0.1 * m.out_features) for m in own.modules() if isinstance(m, Storage)} == {
        int(m.wide_rows().sum()) for m in own.modules() if isinstance(m, Storage)}

    with pytest.warns(UserWarning, match="no calibration data"):
        blank = apply_storage(tiny.llama(seed=1), config_of(group_size=16, salience="local"))
    blank.load_state_dict(model.state_dict())
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(blank(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_a_folder_of_codes_is_the_same_after_a_kill(tmp_path):
    import graftwork
    from graftwork.compression.quantize import quantize

    folder = tiny.save(tiny.llama(), tmp_path / "dense")
    options = {"storage": {"method": "mixllm", "group_size": 16}, "data": ["abc def the user is there. " * 9], "samples": 3, "length": 24}
    quantize(folder, tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill(done, blocks):
        raise Killed

    with pytest.raises(Killed):
        quantize(folder, tmp_path / "halves", **options, progress=kill)
    report = quantize(folder, tmp_path / "halves", **options)
    assert report.resumed == 1
    files = sorted(p.name for p in (tmp_path / "whole").iterdir() if p.suffix == ".safetensors")
    assert len(files) == 3
    for file in files:
        one, other = load_file(tmp_path / "whole" / file), load_file(tmp_path / "halves" / file)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert not (tmp_path / "halves" / "quantize-prepared.safetensors").exists()
    loaded = graftwork.load(tmp_path / "whole")[0]
    parts = {float(m.wide_rows().float().mean()) for m in loaded.modules() if isinstance(m, Storage)}
    assert len(parts) > 3


def test_without_next_token_loss_rows_are_ranked_locally():
    cls = lookup("storage", "mixllm").cls
    with pytest.warns(UserWarning, match="no next token"):
        assert cls.prepare(tiny.bert(), config_of(), [{"input_ids": tiny.tokens()}]) == {}
    with pytest.raises(UsageError, match="two tokens"):
        cls.prepare(tiny.llama(), config_of(), [{"input_ids": tiny.tokens(2, 1)}])


@pytest.mark.slow
def test_integer_products_of_the_leaves_are_exact():
    """Step 1: codes without their zero as int8, whole products per group; step 2: times both scales."""
    statistics = statistics_of(normal(50, 64, seed=1))
    stored = make_storage(normal(24, 64), "mixllm", config_of(wide=0.25, salience="local"), statistics=statistics)
    leaves, x = stored.leaves(), normal(5, 64, seed=3).view(5, 2, 32)
    step = x.abs().amax(-1, keepdim=True) / 127
    integers = (x / step).round()
    parts = []
    for prefix, bits in (("wide_", 8), ("", 4)):
        codes = unpack(leaves[f"{prefix}codes"], 64, bits).int().view(-1, 2, 32)
        codes = codes - (128 if prefix else leaves["zero"].int()[..., None])
        assert codes.abs().max() <= 128
        sums = torch.einsum("tgi,ogi->tog", integers.int(), codes).double()
        parts.append((sums * step[:, None, :, 0].double() * leaves[f"{prefix}scale"].double()).sum(-1))
    got = torch.cat(parts, 1)[:, leaves["place"].long()]
    expected = (integers * step).view(5, 64).double() @ stored.dequantize().double().T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("options", "wide", "bits"), [({}, 6, 4), ({"wide": 0.5}, 32, 4), ({"wide": 0.0}, 0, 4), ({"wide": 1.0}, 64, 4),
                                                       ({"bits": 3}, 6, 3), ({"group_size": 64}, 6, 4)], ids=str)
def test_bits_per_weight(options, wide, bits):
    group, p = options.get("group_size", 32), wide / 64
    stored = make_storage(torch.empty(64, 256, device="meta"), "mixllm", config_of(**options))
    assert stored.bits_per_weight == pytest.approx(8 * p + bits * (1 - p) + (16 * p + 24 * (1 - p)) / group + 32 / 256)
    real = make_storage(normal(64, 256), "mixllm", config_of(**options), statistics=statistics_of(normal(20, 256, seed=1)))
    assert real.bits_per_weight == stored.bits_per_weight
