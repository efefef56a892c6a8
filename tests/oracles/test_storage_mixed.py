"""A format for every matrix under a budget: against exhaustive search, uniform bits, and losses measured of whole choices."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

import graftwork
import tiny
from graftwork.compression import quantize as module
from graftwork.compression.quantize import quantize
from graftwork.errors import UsageError
from graftwork.modeling.models import load_model
from graftwork.registry import make_config
from graftwork.storage import Storage, apply_storage, storage_bits
from graftwork.storage.base import make_storage
from graftwork.storage.mixed import MixedStorage

INTS = ["int2", "int3", "int4"]
TEXTS = [f"the answer to question {i} is {i * 7 % 31}, and it is not {i % 5}." for i in range(60)]


def stored(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Storage)}


def mixed(model, batches=None, **options):
    return apply_storage(copy.deepcopy(model), make_config("storage", "mixed", **{"candidates": INTS, **options}), batches=batches)


def counted(model):
    """Bits of all leaves, and how many weights they are."""
    return (8 * sum(leaf.numel() * leaf.itemsize for m in stored(model).values() for leaf in m.leaves().values()),
            sum(m.in_features * m.out_features for m in stored(model).values()))


def errors(model, dense, hessians=None):
    found = {}
    for name, each in stored(model).items():
        off = (each.dequantize() - dense.get_submodule(name).weight.detach()).double()
        found[name] = float((off @ hessians[name] * off).sum() if hessians else (off**2).sum())
    return found


def linears(model):
    return [each for each in model.modules() if type(each) is torch.nn.Linear and each is not model.get_output_embeddings()]


def second_moments(model, ids):
    found, handles = {}, []
    for name, each in model.named_modules():
        if type(each) is torch.nn.Linear and each is not model.get_output_embeddings():
            def hook(_, args, name=name):
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                found[name] = x.T @ x / len(x)
            handles.append(each.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("cost", ["weights", pytest.param("outputs", marks=pytest.mark.slow)])
def test_the_choice_is_that_of_exhaustive_search(cost):
    dense, ids = tiny.llama(num_hidden_layers=1), tiny.tokens()
    for size, each in zip((1, 3, 8, 1, 2, 4, 1), linears(dense)):
        each.weight.data *= size
    hessians = second_moments(dense, ids) if cost == "outputs" else None
    uniform = [apply_storage(copy.deepcopy(dense), make_config("storage", name)) for name in INTS]
    cost_of = [errors(each, dense, hessians) for each in uniform]
    size_of = [{n: m.bits_per_weight * m.in_features * m.out_features for n, m in stored(each).items()} for each in uniform]
    names, least, seen = list(cost_of[0]), {}, set()
    for bits in (2.6, 3.4):
        room = bits * counted(uniform[0])[1]
        for chosen in itertools.product(range(3), repeat=len(names)):
            if sum(size_of[c][n] for c, n in zip(chosen, names)) <= room:
                total = sum(cost_of[c][n] for c, n in zip(chosen, names))
                least[bits] = min(least.get(bits, total), total)
        model = mixed(dense, [{"input_ids": ids}] if cost == "outputs" else None, bits=bits, cost=cost)
        taken, weights = counted(model)
        assert taken <= room and storage_bits(model) == taken / weights
        assert sum(errors(model, dense, hessians).values()) == pytest.approx(least[bits], rel=1e-4)
        seen.add(tuple(m.method for m in stored(model).values()))
        assert all(m.options == make_config("storage", m.method) for m in stored(model).values())
    assert least[3.4] < 0.95 * sum(cost_of[1].values())  # int3 everywhere takes as much
    assert len(seen) == 2


def learned(steps=250):
    """A model that has learned sequences in which each token hangs on the one before, and some of them."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randint(3, tiny.VOCAB, (tiny.VOCAB, 2), generator=generator)

    def fresh(rows):
        ids = torch.randint(3, tiny.VOCAB, (rows, 1), generator=generator)
        for _ in range(23):
            ids = torch.cat([ids, follows[ids[:, -1], torch.randint(0, 2, (rows,), generator=generator)][:, None]], 1)
        return ids

    model = tiny.llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = fresh(16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), fresh(16)


@torch.no_grad()
def loss_of(model, ids):
    return float(F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.slow
@torch.no_grad()
def test_rises_of_single_matrices_foretell_those_of_whole_choices():
    from graftwork.storage.base import places
    from graftwork.storage.mixed import _measured

    with torch.enable_grad():
        model, ids = learned()
    before = copy.deepcopy(model.state_dict())
    config = make_config("storage", "mixed", candidates=INTS, cost="loss", rows=12, bits=3.0)
    batches = [{"input_ids": ids[:8]}, {"input_ids": ids[8:]}]
    found = places(model, config)
    table = torch.tensor(_measured(model, config, found, batches))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    base = loss_of(model, ids[:12])
    for at in (0, 5, 13):  # against the definition
        one = copy.deepcopy(model)
        weight = one.get_submodule(found[at].name).weight
        weight.copy_(make_storage(weight, "int2", make_config("storage", "int2")).dequantize())
        assert float(table[at, 0]) == pytest.approx(max(loss_of(one, ids[:12]) - base, 1e-6), abs=1e-5)
    generator, predicted, measured = torch.Generator().manual_seed(1), [], []
    for _ in range(12):
        chosen, joint = torch.randint(0, 3, (len(found),), generator=generator), copy.deepcopy(model)
        for place, each in zip(found, chosen.tolist()):
            weight = joint.get_submodule(place.name).weight
            weight.copy_(make_storage(weight, INTS[each], make_config("storage", INTS[each])).dequantize())
        predicted.append(float(table[range(len(found)), chosen].sum()))
        measured.append(loss_of(joint, ids[:12]) - base)
    correlation = torch.corrcoef(torch.tensor([predicted, measured]))[0, 1]
    assert correlation > 0.85, correlation
    chosen, single = (mixed(model, batches, cost="loss", rows=rows, bits=3.0) for rows in (12, 1))
    assert storage_bits(chosen) <= 3 and [m.method for m in stored(chosen).values()] != [m.method for m in stored(single).values()]
    three = apply_storage(copy.deepcopy(model), make_config("storage", "int3"))
    same = mixed(model, batches, cost="loss", rows=12, bits=storage_bits(three))
    assert loss_of(chosen, ids[:12]) - base < sum(measured) / len(measured)  # the random ones take 3.4 bits in the mean
    assert storage_bits(same) <= storage_bits(three) and loss_of(same, ids[:12]) < loss_of(three, ids[:12])


@pytest.mark.slow
def test_calibrated_candidates_and_experts_that_no_data_reached():
    options = {"candidates": [{"method": "int3", "calibration": "gptq"}, {"method": "nf", "bits": 2}, "int4"], "cost": "outputs", "bits": 3}
    dense = tiny.mixtral()
    with pytest.warns(UserWarning, match="rounded to the nearest"):
        model = mixed(dense, [{"input_ids": torch.tensor([[5, 9, 5]])}], **options)
    assert storage_bits(model) <= 3 and len(stored(model)) == 2 * (4 + 8)
    kinds = {m.method for m in stored(model).values()}
    assert len(kinds) > 1 and torch.isfinite(model(input_ids=tiny.tokens()).logits).all()
    with pytest.raises(UsageError, match="no such data"):
        mixed(dense, **options)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_folders_keep_the_choice_also_after_a_kill(calibrated, tmp_path, monkeypatch):
    dense = tiny.save(tiny.llama(num_hidden_layers=3), tmp_path / "m")
    storage, more = {"method": "mixed", "bits": 3.1, "candidates": INTS}, {}
    if calibrated:
        storage |= {"candidates": ["int2", {"method": "int4", "calibration": "gptq"}], "cost": "outputs"}
        more = {"data": TEXTS, "samples": 4, "length": 24}
    report = quantize(dense, tmp_path / "q", storage=storage, **more)
    loaded, _ = graftwork.load(tmp_path / "q")
    assert report.bits_per_weight == storage_bits(loaded) <= 3.1 and report.maps == 21
    assert loaded.graft_storage == make_config("storage", "mixed", **{k: v for k, v in storage.items() if k != "method"})
    assert len({m.method for m in stored(loaded).values()}) > 1
    if not calibrated:
        expected = mixed(load_model(dense)[0], bits=3.1).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    real, done = module._Work._write, []

    def once(self, index, tensors):
        if index == 2:
            raise KeyboardInterrupt
        done.append(index)
        real(self, index, tensors)

    monkeypatch.setattr(module._Work, "_write", once)
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "k", storage=storage, **more)
    monkeypatch.undo()
    assert quantize(dense, tmp_path / "k", storage=storage, **more).resumed == len(done) == 2
    for file in (tmp_path / "q").iterdir():
        assert file.read_bytes() == (tmp_path / "k" / file.name).read_bytes() or file.name == ".lock"
    document = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert len(document["variants"]) <= 3 and len(document["modules"]) == 21 and not document["uncalibrated"]


def test_a_matrix_alone_plans_and_refusals():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for bits, name in ((2.5, "int2"), (3.4, "int3"), (9, "int4"), (1, "int2")):
        assert make_storage(weight, "mixed", make_config("storage", "mixed", candidates=INTS, bits=bits)).method == name
    with torch.device("meta"):
        hollow = tiny.llama_config()
        from transformers import AutoModelForCausalLM

        hollow = AutoModelForCausalLM.from_config(hollow)
    config = make_config("storage", "mixed", candidates=INTS, bits=3.1)
    plan, real = apply_storage(hollow, config), mixed(tiny.llama(), bits=3.1)
    assert 3.0 < storage_bits(plan) <= 3.1 and storage_bits(plan) == pytest.approx(storage_bits(real), rel=0.03)
    with pytest.raises(UsageError, match="2.4 bits a weight"):
        mixed(tiny.llama(), bits=2.3)
    with pytest.raises(UsageError, match="next token"):
        mixed(tiny.ALL["bert"](), [{"input_ids": tiny.tokens()}], cost="loss")
    for wrong, text in (("dense", "no candidate"), ("mixed", "no candidate"), ("spqr", "depends on the weights"),
                        ({"method": "int3", "skip_modules": []}, "of mixed"), ("int9", "no storage")):
        with pytest.raises(UsageError, match=text):
            make_config("storage", "mixed", candidates=["int2", wrong])
    assert MixedStorage.needs(MixedStorage.without_data(make_config("storage", "mixed", cost="loss"))) == frozenset()
