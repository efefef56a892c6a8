"""The example scripts, on a tiny model: the loss falls, a checkpoint holds the graft only, a resume continues."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import graftwork
from graftwork.modeling.state import state_of
from training_support import assert_identical, completions, folder, tensors_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    base = tmp_path_factory.mktemp("examples")
    return folder(base), completions(base / "rows.jsonl", 16)


def script(name):
    if name == "trl_sft":
        pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["transformers_trainer", pytest.param("trl_sft", marks=pytest.mark.slow)])
def test_an_example_learns_saves_the_graft_and_resumes(name, material, tmp_path):
    model, rows = map(str, material)
    module, out = script(name), tmp_path / "out"
    trainer = module.main([model, rows, str(out), "--steps", "20"])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1.0
    checkpoint = out / "checkpoint-10"
    held = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert {"graft/default/graft.safetensors", "graft/default/graft.json", "trainer_state.json", "optimizer.pt"} <= held
    assert not any("model" in Path(p).name and p.endswith((".safetensors", ".bin")) for p in held)

    # from the checkpoint at step 10, with everything after it gone, the same 20 steps end with the same graft
    whole = tensors_of(out / "graft")
    shutil.rmtree(out / "checkpoint-20")
    again = module.main([model, rows, str(out), "--steps", "20", "--resume"])
    assert again.state.global_step == 20
    assert_identical(tensors_of(out / "graft"), whole)

    plain, _ = graftwork.load(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        graftwork.attach_saved(plain, out / "graft")
        after = plain(input_ids=ids).logits
        assert not torch.allclose(before, after, atol=1e-2)
        trained = again.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(after, trained)


def test_the_mixin_moves_the_clock_and_loads_the_best(material, tmp_path):
    from transformers import Trainer, TrainingArguments

    module, clock = script("transformers_trainer"), []
    model, tokenizer = graftwork.load(material[0])
    graft = graftwork.attach(model, "lora", r=2)

    class Watched(graftwork.TrainerMixin, Trainer):
        def compute_loss(self, *args, **kwargs):
            now = state_of(self.model).current
            clock.append((now.seed, now.step, now.micro))
            return super().compute_loss(*args, **kwargs)

    rows = module.encode(material[1], tokenizer)
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                             learning_rate=1e-2, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
                             metric_for_best_model="loss", greater_is_better=True, logging_strategy="no", report_to="none",
                             seed=9, disable_tqdm=True, remove_unused_columns=False, use_cpu=True)
    trainer = Watched(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=module.collate)
    trainer.train()
    assert [c for c in clock if c[0] == 9] == [(9, s, m) for s in range(3) for m in range(2)]
    # the highest eval loss counts as the best here: the first checkpoint's graft is put back
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = tensors_of(tmp_path / "checkpoint-1" / "graft" / "default")
    for name, parameter in graft.named_parameters():
        assert torch.equal(parameter, saved[f"graft.safetensors/{name}"])
