"""PV-Tuning: the P step against float64 autograd, the V step against a loop and its bounds, merging, files, a tiny LM."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graftwork
import tiny
from adapter_support import attach, close, output
from graftwork.data.collate import Collator
from graftwork.errors import ArtifactError, IncompatibleError, RecipeError
from graftwork.estimators.backprop import Backprop, BackpropEstimator
from graftwork.objectives.causal_lm import CausalLMObjective
from graftwork.recipe import load_recipe
from graftwork.registry import make_config
from graftwork.selection.base import SelectionContext
from graftwork.selection.pv_tuning import PVCodes, PVTuningSelection
from graftwork.storage import _tiles
from graftwork.storage._packing import unpack
from graftwork.storage.base import apply_storage
from graftwork.storage.nf import levels
from graftwork.training.step import TrainStep

OUT, IN = 12, 20
STORAGES = {
    "int": {"method": "int3", "group_size": 8},
    "symmetric": {"method": "int2", "group_size": -1, "symmetric": True},
    "zeros": {"method": "int3", "group_size": 8, "zero_point": "float"},
    "nf": {"method": "nf", "bits": 3, "group_size": 8},
    "book": {"method": "codebook", "bits": 3},
    "books": {"method": "codebook", "bits": 2, "rows_per_book": 5},
    "scaled": {"method": "codebook", "bits": 3, "rows_per_book": 4, "per_rows": "scale"},
}


def site(kind):
    """A model of one stored map, and the graft on it."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(OUT, IN, generator=generator) * 0.1)
    options = dict(STORAGES[kind])
    apply_storage(model, make_config("storage", options.pop("method"), **options))
    graft = attach(model, "pv_tuning", filled=False)
    return model, graft, next(iter(graft.adapters.values()))


def numbers(adapter, kind):
    """f: {leaf: values} -> (out, in, K) float64, the numbers that each weight may be, by the formats' definitions; and the codes."""
    leaves, options = adapter.map.stored.leaves(), STORAGES[kind]
    bits = options.get("bits", int(options["method"][-1]) if options["method"][-1].isdigit() else None)
    codes = unpack(adapter.codes, IN, bits).long()
    size = options.get("group_size", 0)
    group = torch.arange(IN) // (IN if size == -1 else size or IN)

    def table(values):
        if options["method"] == "codebook":
            which = torch.arange(OUT) // (options.get("rows_per_book") or OUT)
            books = values["book"].double()
            if kind == "scaled":
                return (books[0] * leaves["scale"].double()[which][:, None])[:, None, :].expand(OUT, IN, -1)
            return books[which][:, None, :].expand(OUT, IN, -1)
        scale = values["scale"].double()[:, group][..., None]
        if options["method"] == "nf":
            return scale * torch.tensor(levels(bits)).double()
        zero = values["zero"] if kind == "zeros" else leaves.get("zero")
        zero = 2.0 ** (bits - 1) if zero is None else zero.double()[:, group][..., None]
        return scale * (torch.arange(2**bits) - zero)

    return table, codes


def context(graft, step=0):
    return SelectionContext(graft.model, graft, list(graft.named_parameters()), None, step, 100, 0)


def inputs():
    return torch.randn(6, IN, generator=torch.Generator().manual_seed(3))


def v_step(model, graft, weights, x=None, **options):
    """One V step on sum(y * weight) for every weight; returns x."""
    x = inputs() if x is None else x
    selection = PVTuningSelection(PVCodes(**options))
    selection.begin(context(graft))
    selection.before_step(context(graft))
    for weight in weights:
        (model(x) * weight).sum().backward()
    selection.after_step(context(graft))
    return x


def noise(seed, *shape):
    return torch.randn(*(shape or (6, OUT)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["int", *(pytest.param(k, marks=pytest.mark.slow) for k in STORAGES if k != "int")])
def test_the_p_step_is_autograd_through_the_numbers(kind, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 5 * IN)  # tiles of 5 rows, and a shorter last one
    model, graft, adapter = site(kind)
    for value in adapter.values.values():
        value.data += 0.01 * noise(1, *value.shape)
    table, codes = numbers(adapter, kind)
    x = noise(2, 6, IN).requires_grad_()
    y = model(x)
    (y * noise(4)).sum().backward()
    values = {n: v.detach().double().requires_grad_() for n, v in adapter.values.items()}
    assert set(values) == ({"book"} if "book" in values else {"scale", "zero"} if kind == "zeros" else {"scale"})
    D, wide = table(values).gather(-1, codes[..., None])[..., 0], x.detach().double().requires_grad_()
    wanted = F.linear(wide, D, model[0].bias.double())
    (wanted * noise(4).double()).sum().backward()
    close(y, wanted, 1e-5)
    close(x.grad, wide.grad, 1e-5)
    for name, value in values.items():
        close(adapter.values[name].grad, value.grad, 1e-5)
    assert graft.parameter_groups()[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("options", [{"max_code_change": 0.2, "trust_ratio": 0.3}, {"max_code_change": 0.07, "trust_ratio": None}], ids=str)
@pytest.mark.parametrize("kind", ["book", *(pytest.param(k, marks=pytest.mark.slow) for k in STORAGES if k != "book")])
def test_the_v_step_by_a_loop(kind, options):
    """Two micro-batches, the first of which chooses the candidates; every option enters."""
    model, graft, adapter = site(kind)
    table, before = numbers(adapter, kind)
    allowed = table({n: v.detach() for n, v in adapter.values.items()})
    D = allowed.gather(-1, before[..., None])[..., 0]
    weights = [noise(4), 0.5 * noise(5)]
    x = v_step(model, graft, weights, code_lr=0.9, **options)
    after = numbers(adapter, kind)[1]

    first, second = ((w.T @ x).double().flatten() for w in weights)
    k = math.ceil(options["max_code_change"] * (OUT * IN))
    norms = [math.dist([0] * IN, row) * math.dist([0] * OUT, column) for row in first.view(OUT, IN) for column in first.view(OUT, IN).T]
    at = sorted(range(OUT * IN), key=lambda i: -abs(first[i]) / norms[i])[:k]
    G = {i: float(first[i] + second[i]) / norms[i] for i in at}
    rms = math.sqrt(sum(g * g for g in G.values()) / k)
    expected, spent = before.clone().flatten(), 0.0
    bound = math.inf if options["trust_ratio"] is None else options["trust_ratio"] * float(D.norm())
    for i in sorted(at, key=lambda i: -abs(G[i])):
        row, column = divmod(i, IN)
        target = float(D[row, column]) - 0.9 * float(D.square().mean().sqrt()) * G[i] / rms
        code = int((allowed[row, column] - target).abs().argmin())
        change = float(allowed[row, column, code] - D[row, column]) ** 2
        if math.sqrt(spent + change) > bound and spent > 0:
            break
        spent += change
        expected[i] = code
    assert torch.equal(after.flatten(), expected) and not torch.equal(after, before)
    assert (after != before).sum() <= k and math.sqrt(spent) <= bound
    new = allowed.gather(-1, after[..., None])[..., 0]
    assert float((new - D).norm()) <= bound * (1 + 1e-9)
    close(adapter.weight(), new, 1e-6)


def test_all_codes_of_a_book_are_the_nearest_to_the_target():
    model, graft, adapter = site("book")
    D, book = adapter.weight().double(), adapter.values["book"].detach().double()[0]
    x = v_step(model, graft, [noise(4)], max_code_change=1.0, trust_ratio=None, code_lr=0.7)
    G = (noise(4).T @ x).double()
    G = G / G.norm(dim=1, keepdim=True) / G.norm(dim=0, keepdim=True)
    target = D - 0.7 * D.square().mean().sqrt() * G / G.square().mean().sqrt()
    assert torch.equal(numbers(adapter, "book")[1], (target[..., None] - book).abs().argmin(-1))


def test_an_input_far_above_the_others_does_not_take_all_moves():
    """Its gradients are, so by them alone every code that moves would be in its column."""
    model, graft, adapter = site("int")
    before, column = numbers(adapter, "int")[1], 7
    x = inputs()
    x[:, column] *= 1000
    assert sorted(i % IN for i in (noise(4).T @ x).flatten().abs().topk(OUT).indices.tolist()) == [column] * OUT
    v_step(model, graft, [noise(4)], x, code_lr=2.0, trust_ratio=None, max_code_change=1 / IN)
    moved = (numbers(adapter, "int")[1] != before).sum(0)
    assert moved.sum() > OUT // 2 and moved[column] <= 2


def test_one_change_is_always_allowed_and_other_steps_move_nothing():
    model, graft, adapter = site("int")
    before = numbers(adapter, "int")[1]
    v_step(model, graft, [noise(4)], code_lr=2.0, trust_ratio=1e-9, interval=2)
    assert torch.equal(numbers(adapter, "int")[1], before) and adapter.watch is None
    v_step(model, graft, [noise(4)], code_lr=1e-4, max_code_change=0.2)
    assert torch.equal(numbers(adapter, "int")[1], before), "no target is nearer to another code"
    v_step(model, graft, [noise(4)], code_lr=2.0, trust_ratio=1e-9, max_code_change=0.2)
    assert (numbers(adapter, "int")[1] != before).sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORAGES)
@torch.no_grad()
def test_merging_writes_codes_and_values(kind):
    model, graft, adapter = site(kind)
    x, kept = noise(2, 6, IN), model[0].codes.clone()
    bare = model(x)
    with torch.enable_grad():
        v_step(model, graft, [noise(4)], code_lr=1.5, trust_ratio=None, max_code_change=0.1)
    for value in adapter.values.values():
        value += 0.003 * noise(1, *value.shape)
    learned, weight = model(x), adapter.weight()
    report = graft.merge()
    held = model[0].graft.whole.frozen.module
    assert report.target == "stored" and report.worst < 1e-6 and type(held).method == STORAGES[kind]["method"]
    torch.testing.assert_close(model(x), learned)  # products of bare storages may sum in another order
    assert torch.equal(held.dequantize(), weight) and torch.equal(held.leaves()["codes"], adapter.codes)
    assert all(held.leaves()[n].dtype == torch.float32 for n in adapter.values)
    graft.unmerge()
    rounded = graft.merge(requantize=True)
    held = model[0].graft.whole.frozen.module
    assert held.bits_per_weight == model[0].bits_per_weight and 1e-7 < rounded.worst < 1e-1
    graft.detach()
    torch.testing.assert_close(model(x), bare)
    assert torch.equal(model[0].codes, kept)


@pytest.mark.slow
def test_slices_of_a_fused_projection_move_their_own_codes():
    model = tiny.gpt2()
    apply_storage(model, make_config("storage", "int3", group_size=16))
    whole = attach(model, "pv_tuning", name="w", filled=False)
    parts = attach(model, "pv_tuning", name="p", filled=False, target_modules="q,v")
    for name, part in parts.adapters.items():
        full, rows = whole.adapters[name.split("[")[0]], part.map.rows
        moved = noise(6, *full.weight().shape) > 1
        target = full.weight() + 0.1 * noise(7, *moved.shape)
        assert torch.equal(part.recoded(target[rows], moved[rows]), full.recoded(target, moved)[rows])
        assert not torch.equal(part.recoded(target[rows], moved[rows]), part.codes)
    model = tiny.gpt2()
    apply_storage(model, make_config("storage", "codebook"))
    with pytest.raises(IncompatibleError, match="shares its code book"):
        attach(model, "pv_tuning", target_modules="q,v")


def test_published_codes_with_columns_in_another_order():
    """`group_index` says the group of a column."""
    model, _, adapter = site("int")
    stored = model[0]
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    leaves = {**stored.leaves(), "group_index": (torch.arange(IN) // 8)[order].int()}
    target = stored.decode(leaves, slice(0, OUT)) + 0.2 * noise(1, OUT, IN)
    codes = unpack(type(stored).recoded(stored_with(stored, leaves), target, {}, torch.ones(OUT, IN, dtype=torch.bool)), IN, 3)
    scale, zero = (leaves[n].double()[:, leaves["group_index"].long()][..., None] for n in ("scale", "zero"))
    assert torch.equal(codes.long(), (target[..., None] - scale * (torch.arange(8) - zero)).abs().argmin(-1))


def stored_with(stored, leaves):
    return type(stored)(OUT, IN, stored.options, leaves, None, torch.float32)


def chain(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 128, (rows, 1), generator=generator)
    for _ in range(19):
        ids = torch.cat([ids, 4 + (ids[:, -1:] * 7 + torch.randint(0, 2, (rows, 1), generator=generator)) % 124], 1)
    return ids


def batch_of(seed):
    return Collator(0).collate([{"input_ids": row, "labels": row} for row in chain(16, seed).tolist()])


def tuned(model, selections, steps=12):
    graft = graftwork.attach(model, "pv_tuning")
    groups = [{k: v for k, v in g.items() if k != "names"} for g in graft.parameter_groups()]
    step = TrainStep(model, CausalLMObjective(), BackpropEstimator(Backprop()), list(graft.named_parameters()), [graft], selections,
                     graftwork.optimizer("adamw", groups, lr=3e-3), 0.0, (), steps, 0)
    for at in range(steps):
        step.run([batch_of(100 + at)], at)
    return graft


@pytest.mark.slow
def test_codes_and_values_recover_more_than_values_alone(tmp_path):
    """Held-out loss of a tiny model, 0.794: in 2 bits 1.000, after 12 P steps 0.878, with V steps 0.859."""
    def loss(model):
        ids = chain(32, 1)
        with torch.no_grad():
            return float(F.cross_entropy(output(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    dense = tiny.llama()
    optimizer = torch.optim.Adam(dense.parameters(), lr=5e-3)
    for at in range(120):
        optimizer.zero_grad()
        ids = chain(16, 100 + at)
        F.cross_entropy(output(dense, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    place = tiny.save(dense, tmp_path / "base")
    models = [graftwork.load(place, storage={"method": "int2", "group_size": 32}, dtype="fp32")[0] for _ in range(3)]
    before = loss(models[0])
    tuned(models[0], [])
    graft = tuned(models[1], [PVTuningSelection(PVCodes(code_lr=0.8, max_code_change=0.05, trust_ratio=0.03))])
    found = before, loss(models[0]), loss(models[1])
    assert found[2] < found[1] - 0.01 and found[1] < before - 0.1, found
    assert sum(int((a.codes != models[1].get_submodule(n).leaves()["codes"]).sum()) for n, a in graft.adapters.items()) > 100
    graft.save(tmp_path / "saved")
    graftwork.attach_saved(models[2], tmp_path / "saved")
    assert torch.equal(output(models[2], tiny.tokens()), output(models[1], tiny.tokens())), "codes and values are in the artifact"


def test_what_the_base_keeps_of_the_weight_is_checked():
    model, _, adapter = site("int")
    extra = adapter.stored_extra()
    adapter.check_extra(extra)
    model[0].scale.data.add_(1)  # the graft has its own
    adapter.check_extra(extra)
    model[0].zero.data.add_(1)
    with pytest.raises(ArtifactError, match="beside other zero points"):
        adapter.check_extra(extra)


def test_one_half_without_the_other_is_refused(tmp_path):
    text = "model: nowhere\nadapter: {adapter}\ndata: {{train: x.jsonl}}\noutput_dir: out\nstorage: {storage}\nselection: {selection}\n"
    for adapter, storage, selection, match in (("pv_tuning", "int4", "[]", "selection pv_tuning the other"),
                                               ("peqa", "int4", "[pv_tuning]", "acts on adapter pv_tuning"),
                                               ("pv_tuning", "dense", "[pv_tuning]", "storage: int4"),
                                               ("pv_tuning", "nf4", "[pv_tuning]", "trains the codes of")):
        (tmp_path / "r.yaml").write_text(text.format(adapter=adapter, storage=storage, selection=selection))
        with pytest.raises(RecipeError, match=match):
            load_recipe(tmp_path / "r.yaml")
    with pytest.raises(IncompatibleError, match="acts on adapter"):
        model = nn.Sequential(nn.Linear(8, 8))
        PVTuningSelection().begin(context(attach(model, "lora", r=2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "nf", "scaled"])
def test_a_move_on_fake_tensors(kind):
    from torch._subclasses import FakeTensorMode

    site(kind)  # what is imported at the first use wants real tensors
    with FakeTensorMode():
        model, graft, adapter = site(kind)
        shape = adapter.codes.shape
        v_step(model, graft, [noise(4), noise(5)])
        assert adapter.codes.shape == shape and all(v.grad.shape == v.shape for v in adapter.values.values())


@pytest.mark.slow
def test_a_killed_run_resumes_identically_and_is_planned(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    import training_support as support
    from graftwork.training.trainer import GraftTrainer

    model, file = support.folder(tmp_path), support.completions(tmp_path / "rows.jsonl")

    def document(out):
        return support.recipe(model, file, tmp_path / out, adapter={"method": "pv_tuning"}, storage={"method": "int2", "group_size": 32},
                              selection=[{"method": "pv_tuning", "code_lr": 1.0, "trust_ratio": 0.1}],
                              train={"max_steps": 4, "save_steps": 1})

    assert not graftwork.plan(document("plan"), estimate_time=False).notes
    whole = support.run(document("whole"))
    plain = GraftTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyError("killed")
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(GraftTrainer, "training_step", dies)
        support.run(document("half"))
    again = support.run(document("half"), resume=True)
    one, other = (load_file(f"{run.graft}/graft.safetensors") for run in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    graft = whole.grafts[0]
    assert all(not torch.equal(one[f"{n}.codes"], graft.sites[n].product.leaf("codes")) for n in graft.adapters)
