"""Reading recipes: every problem at once with its place, aliases of other tools, overrides, and combinations that are refused."""

import pytest
import yaml

from graftwork.adapters.lora import LoRA
from graftwork.errors import RecipeError, UsageError
from graftwork.recipe import Recipe, TrainConfig, load_recipe
from graftwork.recipe_rules import ALIASES, reasons_against
from graftwork.registry import methods

PLAIN = {"model": "m", "data": {"train": "rows.jsonl"}}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path, text, overrides=None):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text), overrides)
    assert error.value.exit_code == 2
    return [p.replace(str(tmp_path), "") for p in error.value.problems], error.value


# -- what is read ----------------------------------------------------------------------------------------------------------
def test_defaults_and_short_forms(tmp_path):
    made = load_recipe(write(tmp_path, "model: m\ndata: rows.jsonl\nstorage: nf4\nadapter: nola\n"))
    assert (made.model, made.data.train, made.storage.method, made.adapter.method) == ("m", "rows.jsonl", "nf4", "nola")
    assert (made.optimizer.method, made.estimator.method, made.objective.method) == ("adamw", "backprop", "causal_lm")
    assert made.selection == [] and made.initializer is None and made.train == TrainConfig()
    assert load_recipe({**PLAIN, "initializer": "default"}).initializer is None
    assert load_recipe({**PLAIN, "adapter": None}).adapter is None
    assert load_recipe({**PLAIN, "estimator": "mezo"}).optimizer is None


def test_numbers_that_yaml_reads_as_text(tmp_path):
    made = load_recipe(write(tmp_path, "model: m\ndata: d\noptimizer: {method: adamw, lr: 1e-4}\ntrain: {warmup: 5e-2}\n"))
    assert made.optimizer.lr == 1e-4 and made.train.warmup == 0.05


@pytest.mark.parametrize("document", [
    PLAIN,
    {**PLAIN, "storage": {"method": "nf4", "double_quant": False},
     "adapter": {"method": "lora", "r": 3, "rank_pattern": {"q_proj": 5}},
     "initializer": {"method": "pissa"}, "train": {"report_to": ["tensorboard"], "save_total_limit": None, "warmup": 7}},
    {**PLAIN, "adapter": None, "optimizer": {"method": "galore", "rank": 7, "betas": [0.8, 0.9]},
     "selection": [{"method": "lisa", "interval": 3}], "objective": {"method": "classification", "label_smoothing": 0.1}},
    {**PLAIN, "estimator": "zo_adam", "adapter": "mixlora", "train": {"max_grad_norm": 0}},
    {**PLAIN, "estimator": {"method": "mezo", "n_samples": 2},
     "data": {"train": ["a", "b"], "eval": "c", "columns": {"text": "body"}}},
])
def test_the_resolved_recipe_reads_back_to_itself(document, tmp_path):
    made = load_recipe(document)
    again = load_recipe(write(tmp_path, made.yaml()))
    assert again.document() == made.document() and again.yaml() == made.yaml()
    for name in Recipe.model_fields:
        assert getattr(again, name) == getattr(made, name), name
    assert "method" in made.document()["optimizer"] if made.optimizer else True


def test_the_callers_mapping_is_left_alone():
    document = {**PLAIN, "adapter": {"method": "lora"}, "lora_rank": 4}
    made = load_recipe(document, ["adapter.alpha=8", "train.max_steps=3"])
    assert (made.adapter.r, made.adapter.alpha) == (4, 8)
    assert document == {**PLAIN, "adapter": {"method": "lora"}, "lora_rank": 4}


def test_config_objects_are_accepted():
    assert load_recipe({**PLAIN, "adapter": LoRA(r=3)}).adapter.r == 3


@pytest.mark.parametrize("train, more, fleet", [
    ("a/*.jsonl", {}, True), ("a/rows?.jsonl", {}, True), ("a/rows.jsonl", {}, False), (["a", "b/*.jsonl"], {}, False),
    ("org/name[config]:train", {"online": True}, False)])
def test_a_pattern_makes_a_fleet(train, more, fleet):
    assert load_recipe({"model": "m", "data": {"train": train, **more}}).is_fleet is fleet


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "rows[1].jsonl").write_text("")
    assert not load_recipe({"model": "m", "data": str(tmp_path / "rows[1].jsonl")}).is_fleet


# -- problems ----------------------------------------------------------------------------------------------------------------
def test_all_problems_at_once_each_with_its_line(tmp_path):
    found, _ = problems(tmp_path, """\
model: m
adapter:
  method: lora
  rank: 8
storge: nf4
optimizer: {method: adamx}
data: {train: d, max_lenght: 5}
train:
  batch_size: many
  save_steps: -1
  sede: 3
""")
    text = "\n".join(found)
    for line, words in [(4, "unknown key 'adapter.rank'"), (5, "unknown key 'storge' (did you mean 'storage'?)"),
                        (6, "no optimizer 'adamx' (did you mean 'adamw'?)"),
                        (7, "'data.max_lenght' (did you mean 'max_length'?)"),
                        (9, "train.batch_size"), (10, "train.save_steps"), (11, "'train.sede' (did you mean 'seed'?)")]:
        assert any(p.startswith(f"/recipe.yaml:{line}: ") and words in p for p in found), (line, words, text)
    assert len(found) == 7
    assert "keys: " in found[0] and "optimizer methods: adafactor" in text


def test_missing_parts_duplicates_and_wrong_kinds(tmp_path):
    found, _ = problems(tmp_path, "adapter: {r: 4}\n")
    assert any("'model' is missing" in p for p in found) and any("'data' is missing" in p for p in found)
    assert any("'adapter' has no 'method'" in p for p in found)
    found, _ = problems(tmp_path, "model: m\ndata: d\nmodel: n\ntrain: {seed: 1, seed: 2}\n")
    assert [p.split(": ")[0] for p in found] == ["/recipe.yaml:3", "/recipe.yaml:4"] and all("given twice" in p for p in found)
    found, _ = problems(tmp_path, "model: m\ndata: d\ntrain: 7\nstorage: [nf4]\n")
    assert any("'train' must be a mapping" in p for p in found) and any("'storage' is a name or a mapping" in p for p in found)
    found, _ = problems(tmp_path, "model: m\ndata: {}\n")
    assert "'data.train' is missing" in found[0]


@pytest.mark.parametrize("text, words", [("- a\n", "a recipe is a mapping"), ("", "empty"), ("model: [m\ndata: d", "not YAML"),
                                         ("a: b: c\n", "recipe.yaml:1: not YAML")])
def test_documents_that_are_no_recipe(tmp_path, text, words):
    found, error = problems(tmp_path, text)
    assert words in found[0] and error.remedy


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read") as error:
        load_recipe(tmp_path / "none.yaml")
    assert "graft init" in error.value.remedy


def test_a_saved_adapter_that_is_not_there(tmp_path):
    found, _ = problems(tmp_path, f"model: m\ndata: d\nadapter:\n  from: {tmp_path}/gone\n  r: 4\n")
    assert any("is no folder" in p and p.startswith("/recipe.yaml:4") for p in found) and any("remove r" in p for p in found)


# -- overrides and aliases ---------------------------------------------------------------------------------------------------
def test_overrides_come_after_the_file(tmp_path):
    path = write(tmp_path, "model: m\ndata: d\nadapter: lora\ntrain: {max_steps: 5}\nselection: []\n")
    made = load_recipe(path, ["train.max_steps=20", "optimizer.lr=1e-3", "adapter.r=2", "data.eval=e.jsonl", "lora_alpha=6",
                              "storage=nf4", "train.save_total_limit=null"])
    assert (made.train.max_steps, made.optimizer.lr, made.adapter.r, made.adapter.alpha) == (20, 1e-3, 2, 6)
    assert made.data.eval == "e.jsonl" and made.storage.method == "nf4" and made.train.save_total_limit is None
    assert load_recipe(path, ["load_in_4bit=true"]).storage.method == "nf4"


def test_overrides_of_a_selection_in_a_list():
    document = {**PLAIN, "adapter": None, "selection": ["lisa"]}
    assert load_recipe(document, ["selection.0.layers=5"]).selection[0].layers == 5


@pytest.mark.parametrize("text, words", [("train.max_steps", "is no override"), ("=3", "is no override"), ("a=[", "not YAML"),
                                         ("model.x=1", "cannot be set")])
def test_overrides_that_are_none(text, words):
    with pytest.raises(UsageError, match=words) as error:
        load_recipe(PLAIN, [text])
    assert error.value.remedy


def test_a_bad_override_is_named_in_its_problem(tmp_path):
    found, _ = problems(tmp_path, "model: m\ndata: d\n", ["train.batchsize=3", "optimizer.lr=fast"])
    assert any(p.startswith("override train.batchsize=3: ") and "batch_size" in p for p in found)
    assert any(p.startswith("override optimizer.lr=fast: ") for p in found)


def test_keys_of_other_tools_are_understood_with_a_note(tmp_path):
    notes = []
    made = load_recipe(write(tmp_path, """\
model_name_or_path: m
finetuning_type: lora
lora_rank: 6
lora_target: all
quantization_bit: 4
dataset: rows.jsonl
cutoff_len: 77
train_on_inputs: false
per_device_train_batch_size: 3
gradient_accumulation_steps: 2
num_train_epochs: 4
learning_rate: 2e-4
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
bf16: false
report_to: none
"""), notes=notes)
    assert (made.model, made.adapter.method, made.adapter.r, made.adapter.target_modules) == ("m", "lora", 6, "all-linear")
    assert made.storage.method == "nf4" and made.data.train == "rows.jsonl"
    assert (made.data.max_length, made.data.train_on) == (77, "assistant")
    assert (made.train.batch_size, made.train.grad_accumulation, made.train.epochs) == (3, 2, 4)
    assert (made.optimizer.lr, made.train.schedule, made.train.warmup, made.train.precision) == (2e-4, "constant", 0.1, "fp32")
    assert made.train.report_to == []
    assert len(notes) == 16 and f"{tmp_path}/recipe.yaml:3: 'lora_rank' is read as 'adapter.r'" in notes
    assert load_recipe({**PLAIN, "finetuning_type": "full"}).adapter is None


def test_every_alias_leads_to_a_key_that_exists():
    from graftwork.data.config import DataConfig

    homes = {"data": DataConfig, "train": TrainConfig, "adapter": LoRA,
             "optimizer": next(m.config for m in methods("optimizer") if m.name == "adamw")}
    for alias, (path, _) in ALIASES.items():
        section, _, key = path.partition(".")
        assert section in Recipe.model_fields and alias not in Recipe.model_fields
        assert not key or key == "method" or key in homes[section].model_fields, alias


def test_an_alias_beside_the_key_it_stands_for(tmp_path):
    found, _ = problems(tmp_path, "model: m\ndata: d\nadapter: {method: lora, r: 4}\nlora_rank: 8\n")
    assert found == ["/recipe.yaml:4: 'lora_rank' and 'adapter.r' say the same thing: remove one"]


# -- combinations --------------------------------------------------------------------------------------------------------------
REFUSED = {
    "full tuning of codes": ({"adapter": None, "storage": "nf4"}, "storage", "frozen codes", "adapter: lora"),
    "codes that an estimator would move": ({"adapter": None, "storage": "int8", "estimator": "mezo"}, "estimator", "only an optimizer",
        "estimator: backprop"),
    "initializer without adapter": ({"adapter": None, "initializer": "pissa"}, "initializer", "there is none",
        "remove initializer"),
    "fleet without adapter": ({"adapter": None, "data": {"train": "*.jsonl"}}, "data.train", "fleet", "adapter: lora"),
    "projection of an adapter": ({"optimizer": "galore"}, "optimizer", "projects the gradients of full weights", "adamw"),
    "layers of a frozen model": ({"selection": "lisa"}, "selection.0", "model's own weights", "remove selection lisa"),
    "initializer of another adapter": ({"adapter": "paca", "initializer": "pissa"}, "initializer", "starts lora, not paca",
        "adapter: lora"),
    "dropout of a part of W": ({"adapter": {"method": "lora", "dropout": 0.1}, "initializer": "pissa"}, "adapter.dropout",
        "dropout",
                               "adapter.dropout: 0"),
    "prefix before packed rows": ({"adapter": "lopa", "data": {"train": "d", "packing": True}}, "data.packing", "prefix",
        "false"),
    "optimizer of a self-moving estimator": ({"estimator": "mezo", "optimizer": "adamw"}, "optimizer", "takes no optimizer",
        "estimator.lr"),
    "checkpointing without backward": ({"estimator": "mezo", "train": {"gradient_checkpointing": True}},
        "train.gradient_checkpointing",
                                       "no backward pass", "false"),
    "clipping without a gradient": ({"estimator": "mezo", "train": {"max_grad_norm": 1.0}}, "train.max_grad_norm",
        "no gradient to clip", "remove train.max_grad_norm"),
    "dropout between compared forwards": ({"estimator": "zo_sgd", "adapter": {"method": "lora", "dropout": 0.1}}, "adapter.dropout",
        "differ between them", "adapter.dropout: 0"),
    "zeroth order of a fleet": ({"estimator": "mezo", "data": {"train": "*.jsonl"}}, "estimator", "at once", "backprop"),
    "fused and accumulated": ({"optimizer": {"method": "adamw", "fused": True}, "train": {"grad_accumulation": 2,
        "max_grad_norm": 0}},
                              "train.grad_accumulation", "every micro-batch", "optimizer.fused: false"),
    "fused and clipped": ({"optimizer": {"method": "adamw", "fused": True}}, "train.max_grad_norm", "global norm",
        "max_grad_norm: 0"),
    "packed classification": ({"objective": "classification", "data": {"train": "d", "packing": True}}, "data.packing",
                              "whole rows", "false"),
    "fused without backward": ({"estimator": "deepzero", "optimizer": {"method": "adamw", "fused": True}, "train": {"max_grad_norm": 0}},
        "optimizer.fused", "runs none", "optimizer.fused: false"),
    "checkpointing of coordinates": ({"estimator": "deepzero", "train": {"gradient_checkpointing": True}},
        "train.gradient_checkpointing", "no backward pass", "false"),
    "derivative of a metric": ({"objective": "metric"}, "objective", "every derivative would be 0", "estimator: mezo"),
    "tangents of a metric": ({"objective": "metric", "estimator": "forward_gradient"}, "objective", "differentiates", "estimator: mezo"),
    "best of nothing": ({"train": {"restore_best": True}, "data": {"train": "d", "eval_fraction": 0.1}}, "train.eval_steps",
                        "eval_steps is 0", "train.eval_steps: 50"),
    "evaluation of nothing": ({"train": {"eval_steps": 5}}, "data.eval", "needs data", "eval_fraction"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_combinations_that_are_refused_with_reason_and_way_out(name, tmp_path):
    changes, section, reason, remedy = REFUSED[name]
    document = {**PLAIN, **changes}
    found = reasons_against(load_recipe(document, check=False))
    assert [(s, reason in why, remedy in fix) for s, why, fix in found] == [(section, True, True)], found
    top = section.split(".")[0]
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, yaml.safe_dump(document, sort_keys=False)))
    written = (tmp_path / "recipe.yaml").read_text().splitlines()
    line = 1 + next((i for i, text in enumerate(written) if text.startswith(f"{top}:")), 0)
    assert f"recipe.yaml:{line}" in error.value.message or top in document and f"{top}." in section
    assert reason in error.value.message and remedy in error.value.remedy


def test_selections_that_read_gradients(monkeypatch):
    from graftwork.registry import lookup

    document = {**PLAIN, "adapter": None, "selection": "lisa"}
    assert reasons_against(load_recipe(document, check=False)) == []
    monkeypatch.setitem(lookup("selection", "lisa").traits, "reads_gradients", True)
    for more, words in [({"estimator": "mezo"}, "makes none"),
                        ({"optimizer": {"method": "adamw", "fused": True}, "train": {"max_grad_norm": 0}}, "inside backward")]:
        found = reasons_against(load_recipe({**document, **more}, check=False))
        assert [(s, words in why) for s, why, _ in found] == [("selection.0", True)]


def test_a_saved_adapter_takes_no_initializer():
    made = load_recipe({**PLAIN, "initializer": "pissa"}, check=False)
    made.adapter_from = "runs/a/graft"
    assert [s for s, _, _ in reasons_against(made)] == ["initializer"]


def test_the_remedies_work():
    """Each refused recipe with its first remedy applied by hand is accepted, or at least not refused for the same reason."""
    mended = {"full tuning of codes": {"adapter": "lora"}, "projection of an adapter": {"optimizer": "adamw"},
              "layers of a frozen model": {"selection": []}, "initializer of another adapter": {"adapter": "lora"},
              "fused and clipped": {"train": {"max_grad_norm": 0}}, "zeroth order of a fleet": {"estimator": "backprop"},
              "evaluation of nothing": {"data": {"train": "d", "eval_fraction": 0.1}},
              "clipping without a gradient": {"train": {"max_grad_norm": 0}}, "derivative of a metric": {"estimator": "mezo"},
              "dropout between compared forwards": {"adapter": "lora"}}
    for name, change in mended.items():
        load_recipe({**PLAIN, **REFUSED[name][0], **change})


def test_all_reasons_come_together():
    document = {**PLAIN, "optimizer": "galore", "selection": "lisa", "train": {"eval_steps": 5, "early_stopping": 1}}
    with pytest.raises(RecipeError) as error:
        load_recipe(document)
    assert len(error.value.problems) == 3


def test_a_default_that_is_not_set_is_no_choice():
    """The default norm stays silent where nothing is clipped, and the resolved recipe does not turn it into a choice."""
    made = load_recipe({**PLAIN, "estimator": "mezo", "train": {"batch_size": 2}})
    assert "max_grad_norm" not in made.document()["train"] and load_recipe(made.document()).document() == made.document()
    assert load_recipe({**PLAIN, "train": {"batch_size": 2}}).document()["train"]["max_grad_norm"] == 1.0
