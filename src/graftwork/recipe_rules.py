"""Rules of a recipe as data: keys of other tools that are understood, and which choices cannot be combined.

A combination is judged from the traits of its methods, in one function; nothing here names a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .registry import lookup

if TYPE_CHECKING:
    from .recipe import Recipe


def _same(value: Any) -> Any:
    return value


def _none_if_full(value: Any) -> Any:
    return None if value == "full" else value


def _schedule(value: Any) -> Any:
    return "constant" if value == "constant_with_warmup" else value


def _trackers(value: Any) -> Any:
    """One name, or none, where we have a list."""
    return value if isinstance(value, list) else [] if value in (None, "none") else [value]


#: key of another tool -> (our dotted path, conversion)
ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model_name_or_path": ("model", _same), "base_model": ("model", _same),
    "finetuning_type": ("adapter.method", _none_if_full), "fine_tune_type": ("adapter.method", _none_if_full),
    "lora_rank": ("adapter.r", _same), "lora_r": ("adapter.r", _same), "lora_alpha": ("adapter.alpha", _same),
    "lora_dropout": ("adapter.dropout", _same),
    "lora_target": ("adapter.target_modules", lambda v: "all-linear" if v == "all" else v),
    "lora_target_modules": ("adapter.target_modules", _same), "target_modules": ("adapter.target_modules", _same),
    "use_rslora": ("adapter.use_rslora", _same), "load_in_4bit": ("storage", lambda v: "nf4" if v else "dense"),
    "quantization_bit": ("storage", lambda v: "nf4" if v == 4 else v),
    "dataset": ("data.train", _same), "train_file": ("data.train", _same), "cutoff_len": ("data.max_length", _same),
    "sequence_len": ("data.max_length", _same), "max_seq_length": ("data.max_length", _same),
    "max_length": ("data.max_length", _same),
    "packing": ("data.packing", _same), "sample_packing": ("data.packing", _same),
    "train_on_prompt": ("data.train_on", lambda v: "all" if v else "assistant"),
    "train_on_inputs": ("data.train_on", lambda v: "all" if v else "assistant"),
    "mask_prompt": ("data.train_on", lambda v: "assistant" if v else "all"),
    "per_device_train_batch_size": ("train.batch_size", _same), "micro_batch_size": ("train.batch_size", _same),
    "batch_size": ("train.batch_size", _same), "gradient_accumulation_steps": ("train.grad_accumulation", _same),
    "num_train_epochs": ("train.epochs", _same), "num_epochs": ("train.epochs", _same), "epochs": ("train.epochs", _same),
    "max_steps": ("train.max_steps", _same), "iters": ("train.max_steps", _same),
    "learning_rate": ("optimizer.lr", _same), "lr": ("optimizer.lr", _same),
    "lr_scheduler_type": ("train.schedule", _schedule), "lr_scheduler": ("train.schedule", _schedule),
    "warmup_ratio": ("train.warmup", _same), "warmup_steps": ("train.warmup", _same),
    "gradient_checkpointing": ("train.gradient_checkpointing", _same), "save_steps": ("train.save_steps", _same),
    "eval_steps": ("train.eval_steps", _same), "seed": ("train.seed", _same), "report_to": ("train.report_to", _trackers),
    "bf16": ("train.precision", lambda v: "bf16" if v else "fp32"), "max_grad_norm": ("train.max_grad_norm", _same),
}


def reasons_against(recipe: Recipe) -> list[tuple[str, str, str]]:
    """[(section, reason, nearest combination that works)]; empty when the recipe is possible. Looks at traits only, and at the
    config.json of a model folder, whose weights may be codes already."""
    storage, adapter = lookup("storage", recipe.storage.method), recipe.adapter and lookup("adapter", recipe.adapter.method)
    if storage.name == "dense":
        from .storage._folder import kept_in

        storage = lookup("storage", kept_in(recipe.model) or storage.name)
    estimator, objective = lookup("estimator", recipe.estimator.method), lookup("objective", recipe.objective.method)
    optimizer = recipe.optimizer and lookup("optimizer", recipe.optimizer.method)
    start = recipe.initializer and lookup("initializer", recipe.initializer.method)
    selections = [lookup("selection", s.method) for s in recipe.selection]
    fused = bool(getattr(recipe.optimizer, "fused", False))
    found: list[tuple[str, str, str]] = []

    def unless(possible: bool, section: str, why: str, fix: str) -> None:
        if not possible:
            found.append((section, why, fix))

    if adapter is None:
        trained = bool(storage.traits.get("trainable"))
        unless(storage.traits.get("lossless") or trained, "storage",
               f"full tuning trains the weights themselves, and {storage.name} weights are frozen codes",
               f"storage: dense, or keep {storage.name} and add adapter: lora")
        unless(not trained or estimator.traits["gradients"], "estimator",
               f"{estimator.name} moves weights in place, and {storage.name} weights are codes that only an optimizer writes",
               "estimator: backprop, or storage: dense")
        unless(start is None, "initializer", "an initializer starts an adapter, and there is none", "remove initializer")
        unless(not recipe.is_fleet, "data.train", "a fleet trains one adapter a file, and there is no adapter",
               "add adapter: lora")
    else:
        unless(not (optimizer and optimizer.traits.get("projects")), "optimizer",
               f"{optimizer and optimizer.name} projects the gradients of full weights; an adapter's tensors are small already",
               "optimizer: adamw, or adapter: null (full tuning)")
        for i, s in enumerate(selections):
            unless(not s.traits["full_tuning_only"], f"selection.{i}", f"{s.name} chooses among the model's own weights, which "
                   f"{adapter.name} freezes", f"remove selection {s.name}, or adapter: null with storage: dense")
        leaf = adapter.traits.get("owns_leaf")
        kind = f"{leaf}s".replace("ss", "s")
        unless(leaf is None or storage.cls.lets_train(leaf), "adapter",
               f"{adapter.name} trains the {kind} of quantized weights, and {storage.name} has none that can be trained",
               "storage: int4, or adapter: lora")
        partner = adapter.traits.get("selection")
        unless(partner is None or any(s.name == partner for s in selections), "selection",
               f"{adapter.name} is one half of a method, and selection {partner} the other", f"selection: [{{method: {partner}}}]")
        if start is not None:
            unless(not recipe.adapter_from, "initializer",
                   f"{start.name} starts a new adapter, and adapter.from continues a trained one", "remove initializer")
            unless(not (start.traits.get("needs_quantized") and storage.traits.get("lossless")), "initializer",
                   f"{start.name} starts from what quantization loses, and {storage.name} loses nothing",
                   "storage: nf4, or initializer: pissa")
            unless(adapter.name in start.traits["adapters"], "initializer",
                   f"{start.name} starts {', '.join(start.traits['adapters'])}, not {adapter.name}",
                   f"adapter: {start.traits['adapters'][0]}, or initializer: default")
            unless(not (start.traits.get("edits_base") and getattr(recipe.adapter, "dropout", 0)), "adapter.dropout",
                   f"{start.name} moves a part of W into the adapter; dropout would drop it", "adapter.dropout: 0")
        unless(adapter.traits["scope"] != "model" or not recipe.data.packing, "data.packing",
               f"{adapter.name} puts a prefix before each example, packed rows hold several", "data.packing: false")
    unless(estimator.traits["gradients"] or optimizer is None, "optimizer",
           f"{estimator.name} moves the parameters itself and takes no optimizer",
           f"remove optimizer (its rate is estimator.lr of {estimator.name})")
    backward = estimator.traits["gradients"] and estimator.traits["differentiates"]
    unless(backward or not recipe.train.gradient_checkpointing, "train.gradient_checkpointing",
           f"{estimator.name} runs no backward pass, so there are no activations to save", "train.gradient_checkpointing: false")
    unless(not fused or backward, "optimizer.fused",
           f"a fused optimizer updates inside backward, and {estimator.name} runs none", "optimizer.fused: false")
    unless((backward and not estimator.traits["moves_some"]) or not recipe.is_fleet, "estimator",
           f"{estimator.name} measures all adapters of a mixed batch at once", "estimator: backprop")
    unless(estimator.traits["gradients"] or "max_grad_norm" not in recipe.train.model_fields_set or not recipe.train.max_grad_norm,
           "train.max_grad_norm", f"{estimator.name} moves the parameters itself, so there is no gradient to clip",
           "remove train.max_grad_norm")
    dropout = type(recipe.adapter).model_fields.get("dropout") if adapter and not recipe.adapter_from else None
    unless(backward or dropout is None or recipe.adapter.dropout in (0, dropout.default), "adapter.dropout",
           f"{estimator.name} compares forwards of one batch, and dropout would differ between them: it is off", "adapter.dropout: 0")
    unless(not (estimator.traits.get("couples_rows") and recipe.is_fleet), "estimator",
           f"{estimator.name} treats the rows of a batch together, and those of a fleet are of different adapters", "estimator: backprop")
    unless(adapter is None or adapter.name in estimator.traits.get("adapters", [adapter.name]), "estimator",
           f"{estimator.name} trains {', '.join(estimator.traits.get('adapters', []))}, not {adapter and adapter.name}",
           "estimator: backprop")
    unless(objective.traits.get("differentiable", True) or not estimator.traits["differentiates"], "objective",
           f"{objective.name} is piecewise constant and {estimator.name} differentiates: every derivative would be 0",
           "estimator: mezo, which compares values, or objective: causal_lm")
    own = bool(objective.traits.get("teacher")) and recipe.objective.teacher is None
    unless(not (own and recipe.storage.method == "dense" and storage.name != "dense"), "objective.teacher",
           f"{recipe.model} holds {storage.name} codes, and the teacher is to be the dense model", "objective.teacher: the dense model")
    unless(not (own and storage.traits.get("lossless") and not recipe.objective.ce and not recipe.adapter_from), "objective.ce",
           "the student starts as its own teacher, so there is nothing to learn", "objective.teacher: another model, or storage: int2")
    unless(not (fused and estimator.traits.get("reads_gradients")), "estimator",
           f"a fused optimizer updates inside backward, before {estimator.name} could read the gradients", "optimizer.fused: false")
    for i, s in enumerate(selections):
        wanted = s.traits["adapters"]
        unless(not wanted or bool(adapter and adapter.name in wanted), f"selection.{i}",
               f"{s.name} acts on adapter {', '.join(wanted)}, not on {adapter.name if adapter else 'full tuning'}",
               f"adapter: {wanted[0] if wanted else ''}, or remove selection {s.name}")
        unless(not (wanted and recipe.is_fleet), f"selection.{i}",
               f"{s.name} acts on one adapter, and a fleet trains one a file", "train the files one by one")
        unless((estimator.traits["gradients"] and not estimator.traits["moves_some"]) or not s.traits["reads_gradients"], f"selection.{i}",
               f"{s.name} reads gradients and {estimator.name} makes none" + " for some tensors" * estimator.traits["gradients"],
               "estimator: backprop")
        unless(not (fused and s.traits["reads_gradients"]), f"selection.{i}",
               f"a fused optimizer updates inside backward, before {s.name} could read the gradients", "optimizer.fused: false")
    unless(not (fused and recipe.train.grad_accumulation > 1), "train.grad_accumulation",
           "a fused optimizer updates on every micro-batch", "optimizer.fused: false, or train.grad_accumulation: 1")
    unless(not (fused and recipe.train.max_grad_norm > 0), "train.max_grad_norm",
           "a fused optimizer updates before the global norm is known", "train.max_grad_norm: 0, or optimizer.fused: false")
    from .data.formats import FORMATS

    wanted, given = objective.traits.get("format"), recipe.data.format
    unless(wanted in (None, given), "data.format", f"{objective.name} learns one real number a row, and rows of format {given} have none",
           f"data.format: {wanted}")
    real = given in FORMATS and FORMATS[given].task == "regression"
    unless(not real or objective.traits.get("real"), "objective",
           f"rows of format {given} have one real number each, and {objective.name} learns none", "objective: regression")
    unless(not real or getattr(recipe.objective, "metric", None) != "f1", "objective.metric",
           "real labels have no classes, and F1 is over classes", "objective.metric: accuracy (within 0.5)")
    unless(not (recipe.data.packing and objective.traits["task"] == "sequence_classification"), "data.packing",
           f"{objective.name} scores whole rows", "data.packing: false")
    unless(not (recipe.train.early_stopping or recipe.train.restore_best) or bool(recipe.train.eval_steps), "train.eval_steps",
           "early stopping and restore_best compare evaluations, and eval_steps is 0", "train.eval_steps: 50")
    unless(not (recipe.train.early_stopping or recipe.train.restore_best or recipe.train.eval_steps)
           or bool(recipe.data.eval or getattr(recipe.data, "eval_fraction", 0)), "data.eval",
           "evaluation during training needs data", "data.eval: FILE, or data.eval_fraction: 0.05")
    return found
