"""The saved graft: round trip bit for bit, every kind of damage refused with a remedy, nothing half-written."""

import errno
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import graftwork
import tiny
from graftwork.artifact import attach_saved, graft_tensors, load_tensors, read_card, read_tensors, save_graft, seal
from graftwork.errors import ArtifactError, GraftworkError

CASES = {
    "lora": dict(r=3, alpha=5.0, target_modules="attention", bias="lora_only"),
    "paca": dict(r=4, target_modules=["q_proj", "down_proj"]),
    "nola": dict(r=2, n_basis=4, target_modules=["v_proj"]),
    "flora": dict(r=2, target_modules=["o_proj"]),
}


def filled(model, method="lora", seed=1, **options):
    """A graft whose trained values are random, so that nothing is zero."""
    graft = graftwork.attach(model, method, **(options or CASES[method]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return graft


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.fixture
def saved(tmp_path):
    model = tiny.llama()
    graft = filled(model)
    graft.save(tmp_path / "a")
    graft.detach()
    return model, tmp_path / "a"


@pytest.mark.parametrize("method", CASES)
def test_loaded_graft_computes_the_same_bits(method, tmp_path):
    model = tiny.llama()
    graft = filled(model, method)
    before, tensors = logits(model), graft_tensors(graft)
    graft.save(tmp_path / "a")
    other = tiny.llama()
    loaded = graftwork.attach_saved(other, tmp_path / "a")
    assert torch.equal(logits(other), before)
    assert {k: v.tolist() for k, v in graft_tensors(loaded).items()} == {k: v.tolist() for k, v in tensors.items()}
    assert not loaded.parameters() and graftwork.attach_saved(tiny.llama(), tmp_path / "a", trainable=True).parameters()


def test_weight_ranks_and_name_survive(tmp_path):
    model = tiny.llama()
    graft = graftwork.attach(model, "lora", name="mine", r=4, alpha=8, target_modules=["q_proj", "v_proj"],
                             ranks={"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.v_proj": 0})
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.1)
    graft.scale(0.5)
    before = logits(model)
    graft.save(tmp_path / "a")
    other = tiny.llama()
    loaded = attach_saved(other, tmp_path / "a")
    assert loaded.name == "mine" and loaded.weight == 0.5 and len(loaded.adapters) == 3
    assert loaded.adapters["model.layers.0.self_attn.q_proj"].r == 2
    assert torch.equal(logits(other), before)


def test_saved_modules_survive(tmp_path):
    model = tiny.bert_classifier()
    graft = filled(model, r=2, target_modules=["query"], modules_to_save=["classifier"])
    before = logits(model)
    graft.save(tmp_path / "a")
    other = tiny.bert_classifier()
    attach_saved(other, tmp_path / "a")
    assert torch.equal(logits(other), before)


@settings(max_examples=8, deadline=None)
@given(r=st.integers(1, 5), alpha=st.none() | st.floats(0.1, 64), rs=st.booleans(), bias=st.booleans(),
       targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "down_proj"]), min_size=1),
       special=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_round_trip_of_any_lora(tmp_path_factory, r, alpha, rs, bias, targets, special, seed):
    folder = tmp_path_factory.mktemp("trip") / "a"
    model = tiny.llama()
    graft = filled(model, seed=seed % 1000, r=r, alpha=alpha, use_rslora=rs, bias="lora_only" if bias else "none",
                   target_modules=sorted(targets), rank_pattern={r"layers\.1\..*": special})
    graft.seed = seed
    graft.save(folder)
    before = {k: v.clone() for k, v in graft_tensors(graft).items()}
    graft.detach()
    loaded = attach_saved(model, folder)
    after = graft_tensors(loaded)
    assert sorted(after) == sorted(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert loaded.config == graft.config and loaded.seed == seed


# -- damage ---------------------------------------------------------------------------------------------------------------
def rewrite(folder, edit):
    tensors = load_file(folder / "graft.safetensors")
    edit(tensors)
    save_file(tensors, folder / "graft.safetensors")


def recard(folder, edit, sealed=True):
    card = json.loads((folder / "graft.json").read_text())
    edit(card)
    if sealed:
        card["checksum"] = seal(card)
    (folder / "graft.json").write_text(json.dumps(card))


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


KEY = "model.layers.0.self_attn.q_proj.lora_A"


def _nan(t):
    t[KEY][0, 0] = float("nan")


def _value(t):
    t[KEY][0, 0] += 1.0


DAMAGE = {
    "tampered": (lambda f: rewrite(f, _value), "not those that were saved"),
    "nan": (lambda f: rewrite(f, _nan), "NaN"),
    "missing key": (lambda f: rewrite(f, lambda t: t.pop(KEY)), f"missing tensor {KEY}"),
    "unexpected key": (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "unexpected tensor extra"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t.update({KEY: torch.ones(3, 9)})), "expected [3, 64] float32"),
    "wrong dtype": (lambda f: rewrite(f, lambda t: t.update({KEY: t[KEY].half()})), "float16"),
    "truncated": (lambda f: cut(f / "graft.safetensors"), "cannot be read"),
    "no tensors": (lambda f: (f / "graft.safetensors").unlink(), "cannot be read"),
    "no card": (lambda f: (f / "graft.json").unlink(), "has no graft.json"),
    "no folder": (lambda f: shutil.rmtree(f), "is no folder"),
    "card cut": (lambda f: (f / "graft.json").write_text((f / "graft.json").read_text()[:100]), "damaged"),
    "card not a mapping": (lambda f: (f / "graft.json").write_text("[1]"), "damaged"),
    "card without sites": (lambda f: recard(f, lambda c: c.pop("sites")), "damaged"),
    "tampered config": (lambda f: recard(f, lambda c: c["config"].update(alpha=99), sealed=False), "checksum"),
    "tampered weight": (lambda f: recard(f, lambda c: c.update(weight=3.0), sealed=False), "checksum"),
    "newer schema": (lambda f: recard(f, lambda c: c.update(schema_version=2)), "schema 2"),
    "unknown method": (lambda f: recard(f, lambda c: c.update(method="lorax")), "lorax"),
    "unknown option": (lambda f: recard(f, lambda c: c["config"].update(rr=1)), "rr"),
    "other base": (lambda f: recard(f, lambda c: c["base"].update(fingerprint="0" * 64)), "another base"),
    "other sites": (lambda f: recard(f, lambda c: c["sites"].update({"model.layers.9.q_proj": [1, 1, 1]})), "does not fit"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_error_with_a_remedy(kind, saved):
    model, folder = saved
    before = logits(model)
    damage, words = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        attach_saved(model, folder)
    assert words in caught.value.message and caught.value.remedy
    assert torch.equal(logits(model), before) and not any("graft" in n.split(".") for n, _ in model.named_modules())


def test_other_base_is_told_by_the_weights(saved):
    _, folder = saved
    with pytest.raises(ArtifactError, match="another base"):
        attach_saved(tiny.llama(seed=5), folder)


def test_tensors_of_another_graft_do_not_load(saved, tmp_path):
    model, folder = saved
    graft = filled(model, r=5, target_modules="attention")
    with pytest.raises(ArtifactError, match="does not fit"):
        load_tensors(graft, read_tensors(folder, read_card(folder)))


def test_a_change_of_zero_is_refused(tmp_path):
    model = tiny.llama()
    graftwork.attach(model, "lora", r=2).save(tmp_path / "zero")
    with pytest.raises(ArtifactError, match="zero everywhere") as caught:
        attach_saved(tiny.llama(), tmp_path / "zero")
    assert "allow_zero" in caught.value.remedy
    assert attach_saved(tiny.llama(), tmp_path / "zero", allow_zero=True).adapters


def test_moving_the_base_is_no_damage(saved):
    model, folder = saved
    recard(folder, lambda card: card["base"].update(model="elsewhere"), sealed=False)
    assert attach_saved(model, folder).adapters


# -- writing --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [True, False])
def test_full_disk_leaves_nothing_half_written(first, saved, tmp_path, monkeypatch):
    model, folder = saved
    graft = filled(model, seed=2)
    target = tmp_path / "new" if first else folder
    kept = None if first else read_card(folder)["sha256"]

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(GraftworkError, match="no space left") as caught:
        graft.save(target)
    monkeypatch.undo()
    assert caught.value.remedy
    assert (not target.exists()) if first else read_card(folder)["sha256"] == kept and read_tensors(folder, read_card(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path):
    model, _ = saved
    graft = filled(model)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    with pytest.raises(GraftworkError, match="no saved graft"):
        graft.save(tmp_path / "papers")
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "x"
    with pytest.raises(GraftworkError, match="exists already"):
        save_graft(graft, tmp_path / "a", overwrite=False)


def test_planning_sees_the_shapes_of_a_saved_graft(saved):
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, folder = saved
    with FakeTensorMode():
        graft = attach_saved(fake_llama(), folder, trainable=True)
    assert sum(p.numel() for p in graft.parameters()) == sum(
        torch.Size(shape).numel() for shape, _ in read_card(folder)["tensors"].values())


def fake_llama():
    from graftwork.modeling.models import empty_model

    return empty_model(tiny.llama_config())
