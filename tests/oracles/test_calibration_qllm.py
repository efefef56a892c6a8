"""QLLM: the identities of channel reassembly in float64, its search by brute force, the correction's gradients, windows of a model."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tiny
from graftwork.registry import lookup, make_config
from graftwork.storage import Storage, apply_storage
from graftwork.storage._activations import near
from graftwork.storage._channels import columns, identity, reassembled, restored
from graftwork.storage.base import make_storage
from graftwork.storage.calibration.qllm import QLLM, Corrected
from graftwork.storage.calibration.reassembly import best_table, distances, pieces, table
from graftwork.storage.calibration.statistics import InputStatistics

OUT, IN = 12, 41


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(tokens=200, seed=0):
    x = normal(tokens, IN, seed=seed)
    x[:, 4] *= 15
    x[:, 11] *= 40
    return x


def statistics_of(x):
    found = InputStatistics(IN, {"samples", "max_abs"})
    found.add(x)
    return found


def config_of(bits=4, activations="int4", group=16, **options):
    return make_config("storage", f"int{bits}", group_size=group, activations=activations,
                       calibration={"method": "qllm", "search": 5, "steps": 20, **options})


def quantizer(config, bits=4, width=IN):
    return lookup("storage", f"int{bits}").cls.quantizer(config, width)


def matrix_of(channels):
    """M (in, in) fp64, by the definition."""
    into, copy_of = channels.tolist()
    M = torch.zeros(len(into), len(into), dtype=torch.float64)
    for k, c in enumerate(copy_of):
        members = [i for i, where in enumerate(into) if where == c]
        M[k, members] = 1 / (len(members) * copy_of.count(c))
    return M


# -- reassembly ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_disassembly_leaves_a_block_as_it_is():
    """Every map of a float64 block with its large channels in copies."""
    model = tiny.llama().double()
    ids, block = tiny.tokens(2, 9), model.model.layers[0]
    wanted, added = model(input_ids=ids).logits, 0
    for module in [m for m in block.modules() if isinstance(m, torch.nn.Linear)]:
        largest = normal(module.in_features, seed=3).abs().exp()
        count = pieces(largest, 9)
        each = torch.arange(len(count)).repeat_interleave(count)
        added += len(each) - len(count)
        module.forward = lambda x, m=module, c=count, e=each: F.linear((x / c).index_select(-1, e), m.weight.index_select(1, e), m.bias)
    found = model(input_ids=ids).logits
    assert added > 40
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_closed_forms():
    x, weight = normal(50, IN, dtype=torch.float64), normal(OUT, IN, seed=1, dtype=torch.float64)
    channels = identity(IN).long()
    channels[0, [6, 8, 20]] = torch.tensor([13, 13, 5])
    channels[1, [6, 8, 20]] = torch.tensor([40, 40, 2])
    M = matrix_of(channels)
    torch.testing.assert_close(reassembled(x, channels), x @ M.T)
    changed = columns(weight, channels)
    torch.testing.assert_close(changed[:, [13, 40, 6, 8, 5, 2, 20]], torch.stack([
        weight[:, 6] + weight[:, 8] + weight[:, 13], weight[:, 40], weight[:, 40], weight[:, 40], weight[:, 20] + weight[:, 5],
        weight[:, 2], weight[:, 2]], 1))
    torch.testing.assert_close(restored(changed, channels), changed @ M)
    torch.testing.assert_close(columns(restored(changed, channels), channels), changed)
    same = x.clone()
    same[:, [6, 8]], same[:, 20] = same[:, [13, 13]], same[:, 5]
    torch.testing.assert_close(reassembled(same, channels) @ changed.T, same @ weight.T, rtol=1e-12, atol=1e-12)
    one = identity(IN).long()
    one[:, 20] = torch.tensor([5, 2])
    error = (reassembled(x, one) @ columns(weight, one).T - x @ weight.T).square().sum()
    expected = ((x[:, 20] - x[:, 5]) ** 2).sum() * ((weight[:, 20] - weight[:, 5]) ** 2).sum() / 4
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(distances(x, weight)[10, 2] * len(x), expected)


def test_pieces_and_pairs_by_brute_force():
    x, weight = inputs(), normal(OUT, IN, seed=1)
    largest, distance = x.abs().amax(0), distances(x, weight)
    for extra in (1, 3, 8):
        found = pieces(largest, extra)
        thresholds = largest.max().double() * torch.arange(1, 20001) / 20000
        counts = (largest.double() / thresholds[:, None]).ceil().clamp(min=1).long()
        tried = counts[(counts.sum(1) - IN <= extra).nonzero()[0, 0]].tolist()
        assert found.tolist() == tried and sum(tried) - IN == extra
        pairs = []
        for i in range(0, IN, 2):
            free = [j for j in range(1, IN, 2) if tried[i] == tried[j] == 1]
            if free:
                gap = {j: float((x[:, i] - x[:, j]).square().mean() * (weight[:, i] - weight[:, j]).square().sum()) / 4 for j in free}
                pairs.append((min(gap.values()), i, min(gap, key=gap.get)))
        pairs = sorted(pairs)[:extra]
        into, copy_of = table(largest, distance, extra).tolist()
        assert {i: j for i, j in enumerate(into) if i != j} == {i: j for _, i, j in pairs}
        moved = {k: c for k, c in enumerate(copy_of) if k != c}
        assert sorted(moved) == sorted(i for _, i, _ in pairs)
        assert all(list(moved.values()).count(i) == tried[i] - 1 for i in range(IN))
    assert pieces(torch.zeros(5), 2).tolist() == [1] * 5 and table(torch.ones(4), distance[:2, :2], 3) is not None
    assert table(torch.tensor([1.0, 9, 1, 9]), distance[:2, :2], 2) is None  # nothing odd is left to go to


def test_one_channel_of_256_costs_less_in_copies():
    x = normal(400, 256)
    x[:, 3] *= 20
    count = pieces(x.abs().amax(0), 7)
    z = (x / count).repeat_interleave(count, 1)
    errors = [float((near(each, "int4") - each).norm() / each.norm()) for each in (x, z)]
    assert count.sum() == 263 and count[3] == 8 and errors[1] < 0.5 * errors[0]


def test_the_search_takes_the_best_of_all():
    x, weight = inputs(), normal(OUT, IN, seed=1)
    largest, config = x.abs().amax(0), config_of()
    grid, distance = quantizer(config), distances(x, weight)

    def error(channels, kind="int4"):
        z = x @ matrix_of(channels).float().T
        scale = z.abs().amax(1, keepdim=True) / 7
        z = (z / scale).round() * scale if kind == "int4" else z
        return float((z @ grid.nearest(columns(weight, channels)).T - x @ weight.T).square().sum())

    tried = [identity(IN), *(table(largest, distance, extra) for extra in range(1, 11))]
    losses = [error(each) for each in tried]
    found = best_table(weight, grid, x, largest, 0.25, 10)
    assert error(found) == pytest.approx(min(losses), rel=1e-5) and min(losses) < 0.6 * losses[0]
    assert torch.equal(best_table(weight, grid, x, largest, 0.0, 10), identity(IN))
    plain = quantizer(config_of(activations="none"))
    found = best_table(weight, plain, normal(200, IN), torch.ones(IN), 0.25, 10)
    assert torch.equal(found, identity(IN))  # inputs that are not rounded


# -- one matrix ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_storage_rounds_reassembled_inputs():
    weight, x, other = normal(OUT, IN, seed=1), inputs(), inputs(seed=9)
    plain = make_storage(weight, "int4", make_config("storage", "int4", group_size=16, activations="int4"))
    stored = make_storage(weight, "int4", config_of(r=0), statistics=statistics_of(x))
    leaves = stored.leaves()
    M = matrix_of(leaves["channels"])
    assert leaves["channels"].dtype == torch.int16 and not torch.equal(leaves["channels"], identity(IN))
    inner = make_storage(columns(weight, leaves["channels"]), "int4", make_config("storage", "int4", group_size=16))
    assert torch.equal(inner.leaves()["codes"], leaves["codes"])
    torch.testing.assert_close(stored.dequantize().double(), inner.dequantize().double() @ M, rtol=1e-5, atol=1e-6)
    z = other.double() @ M.T
    scale = z.abs().amax(1, keepdim=True) / 7
    expected = ((z / scale).round() * scale) @ inner.dequantize().double().T
    torch.testing.assert_close(stored(other).double(), expected, rtol=1e-4, atol=1e-3)
    given = other.clone().requires_grad_()
    y = stored(given, leaves)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    upstream = normal(200, OUT, seed=4)
    for each in (y, stored(given)):
        torch.testing.assert_close(torch.autograd.grad(each, given, upstream)[0], upstream @ stored.dequantize(), rtol=1e-3, atol=1e-3)
    wanted = other @ weight.T
    assert (stored(other) - wanted).square().mean() < 0.6 * (plain(other) - wanted).square().mean()
    assert stored.bits_per_weight == pytest.approx(plain.bits_per_weight + 32 / OUT)
    moved = torch.zeros(OUT, IN, dtype=torch.bool)
    assert torch.equal(stored.recoded(stored.dequantize() * 2, leaves, moved), leaves["codes"])
    moved[3] = True
    turned = stored.with_leaves({"codes": stored.recoded(stored.dequantize().flip(0), leaves, moved)}).dequantize()
    assert torch.equal(turned[:3], stored.dequantize()[:3]) and not torch.equal(turned[3], stored.dequantize()[3])


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_of_codes_are_of_reassembled_inputs_where_nothing_is_rounded(bits, group):
    weight, x, other = normal(OUT, IN, seed=1), inputs(), normal(7, IN, seed=9)
    config = config_of(bits, activations="none", r=0, group=group)
    stored = make_storage(weight, f"int{bits}", config, statistics=statistics_of(x))
    channels = table(x.abs().amax(0), distances(x, weight), 3)  # whatever the search would take
    assert not torch.equal(channels, identity(IN))
    plain = type(stored)(OUT, IN, config, {**stored.leaves(), "channels": channels}, None, torch.float32)
    torch.testing.assert_close(plain(other), other @ plain.dequantize().T, rtol=1e-4, atol=1e-4)
    given = other.clone().requires_grad_()
    torch.testing.assert_close(plain(given), other @ plain.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("correction", ["inside", "beside"])
def test_the_correction_and_its_gradients(correction):
    config = config_of(correction=correction)
    options, grid = QLLM(correction=correction, r=3, alpha=2.0), quantizer(config)
    channels = table(inputs().abs().amax(0), distances(inputs(), weight := normal(OUT, IN, seed=1)), 4)
    made = Corrected(weight, channels, grid, options)
    start = columns(weight, channels)
    torch.testing.assert_close(made.dense(0.5), grid.nearest(start))
    with torch.no_grad():
        made.factors[0].copy_(normal(OUT, 3, seed=2))
    B, A = (each.detach().double() for each in made.factors)
    assert A.abs().max() <= 1 / IN**0.5
    low = 2 / 3 * B @ A
    rounded = grid.nearest((start.double() + low).float())
    expected = rounded if correction == "inside" else grid.nearest(start) + low.float()
    torch.testing.assert_close(made.dense(0.5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.dense(1.0), rounded, rtol=1e-4, atol=1e-5)
    upstream = normal(OUT, IN, seed=5)
    gradients = torch.autograd.grad(made.dense(0.5), made.factors, upstream)
    torch.testing.assert_close(gradients[0].double(), 2 / 3 * upstream.double() @ A.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1].double(), 2 / 3 * B.T @ upstream.double(), rtol=1e-4, atol=1e-4)
    found = made.found()
    torch.testing.assert_close(grid.decode(found.codes, found.parameters), made.dense(1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_single_matrices_and_every_option():
    weight, x = normal(OUT, IN, seed=1), inputs()

    def kept(**options):
        return make_storage(weight, "int2", config_of(2, **{"lr": 0.02, **options}), statistics=statistics_of(x))

    def error(stored):
        return float((stored(x) - x @ weight.T).square().mean())

    plain, without = make_storage(weight, "int2", make_config("storage", "int2", group_size=16, activations="int4")), kept(r=0)
    base, long = kept(), kept(steps=100)
    assert error(long) < 0.8 * error(without) < 0.8 * error(plain)
    assert torch.equal(base.leaves()["channels"], without.leaves()["channels"])
    for changed in ({"r": 2}, {"alpha": 3.0}, {"lr": 0.05}, {"correction": "beside"}, {"steps": 100}, {"channel_ratio": 0.3, "r": 0},
                    {"search": 1, "r": 0}):
        other, reference = kept(**changed), without if "r" in changed and not changed["r"] else base
        assert any(not torch.equal(value, reference.leaves()[name]) for name, value in other.leaves().items()), changed
        assert error(other) <= error(plain)
    whole = kept(channel_ratio=0.0, r=0)
    assert torch.equal(whole.leaves()["channels"], identity(IN)) and torch.equal(whole.leaves()["codes"], plain.leaves()["codes"])
    fine = [make_storage(weight, "int4", config_of(lr=0.02, steps=100, **more), statistics=statistics_of(x))
            for more in ({"r": 0}, {}, {"correction": "beside"})]
    assert error(fine[1]) < 0.7 * error(fine[0]) and error(fine[2]) == error(fine[0])  # beside gains nothing that rounding leaves
    worse = kept(lr=50.0, steps=3)
    assert torch.equal(worse.leaves()["codes"], without.leaves()["codes"])  # put back


# -- windows of a model ------------------------------------------------------------------------------------------------
def batches(count=3):
    return [{"input_ids": tiny.tokens(4, 16, seed=10 + i)} for i in range(count)]


def model_of():
    model = tiny.llama(num_hidden_layers=3, hidden_size=32, intermediate_size=48, initializer_range=0.2)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[5] = 12
            block.post_attention_layernorm.weight[9] = 20
    return model


def into(model, notes=None, bits=4, **options):
    config = config_of(bits, **{"window": (2, 0), "steps": 8, "lr": 0.01, **options})
    return apply_storage(model, config, batches=batches(), notes=[] if notes is None else notes)


def leaves_of(model):
    return {f"{name} {leaf}": value for name, module in model.named_modules() if isinstance(module, Storage)
            for leaf, value in module.leaves().items()}


@torch.no_grad()
def error(model, dense):
    found = [torch.cat([each.model(**batch)[0] for batch in batches()]) for each in (model, dense)]
    return float((found[0] - found[1]).square().mean())


@pytest.mark.slow
def test_windows_correct_what_reassembly_leaves():
    dense = model_of()
    plain = apply_storage(model_of(), make_config("storage", "int4", group_size=16, activations="int4"))
    without, notes = into(model_of(), r=0), []
    inside, beside = into(model_of(), steps=30), into(model_of(), notes, steps=30, correction="beside")
    errors = [error(each, dense) for each in (plain, without, inside)]
    assert errors[2] < 0.85 * errors[1] and errors[1] < 0.95 * errors[0]
    assert len(notes) == 1 and "beside the codes" in notes[0]
    before, trained, rounded = (float(part.split()[0]) for part in notes[0].split(": ")[1].split(", "))
    assert trained < rounded and trained < before and errors[2] < error(beside, dense)
    layer = "model.layers.1.mlp.up_proj"
    tables = [each.get_submodule(layer).leaves()["channels"] for each in (inside, beside)]
    assert torch.equal(*tables) and not torch.equal(tables[0], identity(32))
    with torch.no_grad():
        x = normal(2, 3, 32, seed=4)
        stored = inside.get_submodule(layer)
        close = near(reassembled(x, tables[0]), "int4") @ stored.values(stored.leaves(), slice(0, 48)).T
        torch.testing.assert_close(stored(x), close, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def last_block(model, batch):
    """What it gives."""
    caught = []
    handle = model.model.layers[-1].register_forward_hook(lambda module, args, out: caught.append(out if torch.is_tensor(out) else out[0]))
    model(**batch)
    handle.remove()
    return caught[0]


@pytest.mark.slow
def test_what_windows_train_is_what_is_kept(monkeypatch):
    """The last error that a window sees is that of the stored blocks."""
    from graftwork.storage.calibration.qllm import QLLMCalibration

    seen, real = [], QLLMCalibration.distances

    def watched(self, output, target):
        seen.append((output.detach().clone(), target.clone()))
        return real(self, output, target)

    monkeypatch.setattr(QLLMCalibration, "distances", watched)
    dense = model_of()
    model = into(copy.deepcopy(dense), window=(3, 0), steps=6)
    assert len(seen) == 3 + 6 + 3
    for (output, target), batch in zip(seen[-3:], batches()):
        for each, found in ((model, output), (dense, target)):
            torch.testing.assert_close(found, last_block(each, batch).flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_a_folder_keeps_the_tables(tmp_path):
    from graftwork.compression.quantize import quantize
    from graftwork.data.calibration import calibration_rows
    from graftwork.modeling.models import load_model

    folder, texts = tiny.save(model_of(), tmp_path / "m"), [f"the answer to question {i} is {i * 7 % 31}." for i in range(60)]
    storage = {"method": "int4", "group_size": 16, "activations": "int4",
               "calibration": {"method": "qllm", "steps": 3, "search": 3, "lr": 0.01, "window": (2, 0)}}
    report = quantize(folder, tmp_path / "q", storage=storage, data=texts, samples=4, length=16)
    rows = calibration_rows(texts, tiny.tokenizer(), samples=4, length=16)
    options = {name: value for name, value in storage.items() if name != "method"}
    expected, found = leaves_of(apply_storage(load_model(folder)[0], make_config("storage", "int4", **options), batches=rows.batches)), \
        load_model(tmp_path / "q")[0]
    assert leaves_of(found).keys() == expected.keys() and any(name.endswith(" channels") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in leaves_of(found).items())
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert found.model.layers[0].self_attn.k_proj.out_features * 2 == 32
    total = sum(rows * width for rows, width in sizes)
    extra = sum(32 * width + 24 * rows * width / 16 for rows, width in sizes)
    assert report.bits_per_weight == pytest.approx(4 + extra / total)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_other_architectures(name):
    model, notes = tiny.ALL[name](), []
    apply_storage(model, config_of(3, window=(2, 0), steps=4, lr=0.02, search=2), batches=batches(), notes=notes)
    with torch.no_grad():
        assert all(torch.isfinite(model(**batch)[0]).all() for batch in batches())
    plain = apply_storage(tiny.ALL[name](), make_config("storage", "int3", group_size=16, activations="int4"))
    moved = [n for n, codes in leaves_of(model).items() if "codes" in n and not torch.equal(codes, leaves_of(plain)[n])]
    assert moved and not [note for note in notes if "alone" in note]
