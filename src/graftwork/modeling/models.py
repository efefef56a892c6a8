"""Getting a model: names, folders, GGUF files and Hub ids to a model, a tokenizer, a config, and the source of its weights.

    resolve("smollm2-135m-instruct") -> ModelRef        what and where, nothing loaded
    load_config(ref)                 -> config          no weights, no conversion
    load_model(ref)                  -> (model, tokenizer); model.graft_source re-reads pristine weights
    empty_model(config_or_ref)       -> model           from the config alone, for planning

What a reference may be, and how it becomes a folder: references.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GraftworkError, ModelError, UsageError, nearest
from .checkpoint import stored_tensors
from .gguf_import import converted_folder, gguf_config, is_converted, quiet_transformers
from .references import PACKAGED, ModelRef, first_line, hub_snapshot, model_folder, resolve
from .source import build_source

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["PACKAGED", "TASKS", "ModelRef", "empty_model", "load_config", "load_model", "load_tokenizer", "model_folder",
           "parse_dtype", "resolve", "tokenizer_of"]
#: in a folder of codes: digests of the dense weights that they were made of
PRISTINE = "pristine.json"
TASKS = {"causal_lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification",
         "regression": "AutoModelForSequenceClassification", "encoder": "AutoModel"}
#: tasks whose model has a score head, which may be new
SCORED = ("classification", "regression")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from `bf16 fp16 fp32 fp64`, a torch name, or a dtype; None stays None. Raises UsageError otherwise."""
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    full = {str(each).removeprefix("torch."): each for each in short.values()}
    name = str(dtype).removeprefix("torch.")
    if name not in short and name not in full:
        raise UsageError(f"there is no dtype '{dtype}'{nearest(name, [*short, *full])}", remedy=f"use {', '.join(short)}")
    return short.get(name) or full[name]


@contextmanager
def _model_errors(what: str, *, task: str) -> Iterator[None]:
    """What Transformers and safetensors raise for unusable models, as one ModelError."""
    from safetensors import SafetensorError

    try:
        yield
    except GraftworkError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        remedy = f"check that the model suits the task '{task}' and that its files are whole"
        if "trust_remote_code" in str(error):
            remedy = "the model brings its own code; read it, then load with trust_remote_code=True"
        elif "allocate" in str(error):
            remedy = "choose a smaller dtype (bf16) or a smaller model; `graft plan` tells what fits"
        raise ModelError(f"cannot load {what}: {first_line(error)}", remedy=remedy) from error


def load_config(ref: str | Path | ModelRef) -> Any:
    """The Transformers config of a reference (also of a folder or file with config.json only), without its weights.

    Raises ModelError for an unreadable config, an unknown architecture, and a checkpoint that is quantised in a way that
    no storage reads. One that can be read has a `quantization_config`.
    """
    from transformers import AutoConfig

    ref = resolve(ref)
    with _model_errors(ref.ref, task="config"):
        if ref.kind == "gguf":
            if not is_converted(ref.path):
                return gguf_config(ref.path)
            folder = converted_folder(ref.path)
        else:
            folder = hub_snapshot(ref, ["*.json"]) if ref.kind == "hub" else ref.path
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=ref.trust_remote_code)
    from ..storage._folder import check_readable, quantization_of  # only here does modeling look at a storage

    quantised = quantization_of(config)
    if quantised is not None:
        try:
            check_readable(quantised)
        except UsageError as error:
            raise ModelError(f"{ref.ref} is quantised already ({quantised.get('quant_method', 'unknown')}), and not as a storage is: "
                             f"{error.message}", remedy=error.remedy) from error
    return config


def load_tokenizer(ref: str | Path | ModelRef) -> Any:
    """The tokenizer of a reference, None where its folder has none. Without a pad token it pads with the end token."""
    from transformers import AutoTokenizer

    ref = resolve(ref)
    folder = ref.path if ref.kind == "config" else model_folder(ref)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
    if not folder.is_dir() or not any((folder / name).is_file() for name in names):
        return None
    with _model_errors(f"the tokenizer of {ref.ref}", task="tokenizer"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=ref.trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of a loaded model: `model.graft_tokenizer` where the caller set it, else that of the folder it came from (kept
    there from then on); None where neither is known. Raises ModelError for a folder that is gone."""
    found = getattr(model, "graft_tokenizer", None)
    if found is None:
        source = getattr(getattr(model, "graft_source", None), "ref", None)
        source = source or getattr(getattr(model, "config", None), "_name_or_path", "")
        found = load_tokenizer(source) if source else None
        if found is not None:
            model.graft_tokenizer = found
    return found


def _auto(task: str) -> Any:
    import transformers

    if task not in TASKS:
        raise UsageError(f"there is no task '{task}'{nearest(task, TASKS)}", remedy=f"tasks: {', '.join(TASKS)}")
    return getattr(transformers, TASKS[task])


def load_model(ref: str | Path | ModelRef, *, task: str = "causal_lm", dtype: str | torch.dtype | None = None,
               num_labels: int | None = None, fake: bool = False, attn_implementation: str = "sdpa",
               trust_remote_code: bool = False, seed: int = 0) -> tuple[nn.Module, Any]:
    """The model (in eval mode, on the CPU) and its tokenizer (None where the folder has none).

    task: `causal_lm`, `encoder` (hidden states), `classification` (with `num_labels`) or `regression` (one output, problem_type
    "regression"); a head that the checkpoint lacks is drawn from `seed`, its names are in `model.graft_new_weights`. dtype None keeps
    the checkpoint's (a converted GGUF: see gguf_import). fake: from the config alone under FakeTensorMode (the active one, else a new
    one), no weights read.
    `model.graft_source` re-reads pristine weights. The global random state is left as it was.
    Raises ModelError (missing, damaged, unsupported, weights missing in the checkpoint) and UsageError (task, dtype).
    """
    auto, wanted = _auto(task), parse_dtype(dtype)
    ref = resolve(ref, trust_remote_code=trust_remote_code)
    ref = replace(ref, trust_remote_code=ref.trust_remote_code or trust_remote_code)
    if fake:
        with _fake_tensors():
            config = load_config(ref)
            model = empty_model(config, task=task, dtype=wanted, num_labels=num_labels, attn_implementation=attn_implementation)
            if getattr(config, "quantization_config", None):
                fill_codes(model, config, ref.path if ref.kind == "folder" else None)
        return model, None if ref.kind == "gguf" and not is_converted(ref.path) else load_tokenizer(ref)

    import torch

    folder = model_folder(ref)
    stored_tensors(folder)  # a truncated file is told apart before anything is allocated
    local = replace(ref, kind="folder", path=folder)
    config, tokenizer = load_config(local), load_tokenizer(local)
    _set_labels(config, num_labels, tokenizer, task)
    if getattr(config, "quantization_config", None):
        with _model_errors(ref.ref, task=task):
            return _load_codes(ref, folder, config, task, wanted, attn_implementation, seed), tokenizer
    with _model_errors(ref.ref, task=task), quiet_transformers(), torch.random.fork_rng(devices=[]):
        model, info = auto.from_pretrained(
            folder, config=config, dtype=wanted or "auto", attn_implementation=_attention(auto, config, attn_implementation),
            use_safetensors=True,
            local_files_only=True, trust_remote_code=ref.trust_remote_code, output_loading_info=True)
    new = sorted(info["missing_keys"])
    _check_missing(model, new, task, ref)
    _draw(model, new, seed)
    model.graft_new_weights = new
    model.graft_source = build_source(model, folder, ref=ref.ref, revision=folder.name if ref.kind == "hub" else ref.revision)
    return model.eval(), tokenizer


def hollow_model(config: Any, **options: Any) -> nn.Module:
    """`empty_model` whose parameters are on meta and whose buffers are real: to be filled."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), quiet_transformers(), torch.random.fork_rng(devices=[]):
        model = empty_model(config, **options)
    model.tie_weights()  # parameters are made anew on meta
    return model


def _load_codes(ref: ModelRef, folder: Path, config: Any, task: str, dtype: torch.dtype | None, attention: str,
                seed: int) -> nn.Module:
    """The model of a folder whose weights are codes, which are kept."""
    import torch

    model = hollow_model(config, task=task, dtype=dtype, attn_implementation=attention)
    source = build_source(model, folder, ref=ref.ref, revision=folder.name if ref.kind == "hub" else ref.revision)
    new = sorted(fill_codes(model, config, folder))
    _check_missing(model, new, task, ref)
    with torch.no_grad():
        for name in new:
            owner, _, last = name.rpartition(".")
            old = model.get_parameter(name)
            model.get_submodule(owner)._parameters[last] = torch.nn.Parameter(torch.empty_like(old, device="cpu"))
    _draw(model, new, seed)
    model.tie_weights()
    model.graft_new_weights = new
    dense = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
    origins = {name: origin for name, origin in source.origins.items() if name in dense}  # codes may have the name and shape of a weight
    model.graft_source = replace(source, origins=origins, coded=True, pristine=_pristine_digests(folder))
    return model.eval()


def fill_codes(model: nn.Module, config: Any, folder: Path | None) -> list[str]:
    """Fill a model that has no values (on meta or fake) from a folder whose weights are codes; None: with storages of the sizes that the
    config tells. Returns the names that the folder lacks."""
    import torch

    from ..storage._folder import OURS, fill, quantization_of, storage_of
    from ..storage._published_folder import apply_published
    from ..storage.base import apply_storage
    from .source import read_stored

    document, missing = quantization_of(config), []
    if folder is None and document.get("quant_method") == OURS:
        apply_storage(model, storage_of(document))
    elif folder is None:
        apply_published(model, document)
    else:
        stored = stored_tensors(folder)
        with torch.no_grad():
            missing = fill(model, document, {name: each.shape for name, each in stored.items()},
                           lambda name: read_stored(stored[name], name))
    model.tie_weights()
    model.__dict__["graft_storage"], model.__dict__["graft_codes_kept"] = storage_of(document), True
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the folder; what is saved from this model is another matter
    return missing


def _pristine_digests(folder: Path) -> dict[str, str] | None:
    import json

    file = folder / PRISTINE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["digests"]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{file} is damaged", remedy="quantize the model again") from error


def empty_model(ref: Any, *, task: str = "causal_lm", dtype: str | torch.dtype | None = None, num_labels: int | None = None,
                attn_implementation: str = "sdpa") -> nn.Module:
    """A model built from a config (or from the config of a reference), no weights read; in eval mode.

    For FakeTensorMode or `torch.device("meta")`, under which it costs no memory. dtype None: the config's, else fp32.
    """
    auto = _auto(task)
    config = load_config(ref) if isinstance(ref, (str, Path, ModelRef)) else ref
    _set_labels(config, num_labels, None, task)
    with _model_errors(getattr(ref, "ref", "the config"), task=task):
        wanted = parse_dtype(dtype) or parse_dtype(getattr(config, "dtype", None)) or parse_dtype("fp32")
        model = auto.from_config(config, dtype=wanted, attn_implementation=_attention(auto, config, attn_implementation))
    return model.eval()


def _attention(auto: Any, config: Any, wanted: str) -> str:
    """What is wanted, or eager where the architecture has no other (recurrent models, and some old ones)."""
    try:
        known = auto._model_mapping[type(config)]
    except (AttributeError, KeyError):  # the model brings its own code
        return wanted
    kinds = known if isinstance(known, (list, tuple)) else [known]
    return wanted if all(getattr(kind, f"_supports_{wanted}", True) for kind in kinds) else "eager"


def _fake_tensors():
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return nullcontext() if detect_fake_mode() is not None else FakeTensorMode()


def _set_labels(config: Any, num_labels: int | None, tokenizer: Any, task: str) -> None:
    if task == "regression":
        if num_labels not in (None, 1):
            raise UsageError(f"a regression head has one output, not {num_labels}",
                             remedy="leave num_labels out, or task='classification'")
        config.num_labels, config.problem_type = 1, "regression"
    elif num_labels is not None:
        if task != "classification" or num_labels < 1:
            raise UsageError("num_labels is the number of classes (1 or more) of the task 'classification'",
                             remedy="load_model(..., task='classification', num_labels=2)")
        config.num_labels = num_labels
    if task in SCORED and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer is not None else 0  # where a causal model finds the last token


def _check_missing(model: nn.Module, missing: list[str], task: str, ref: ModelRef) -> None:
    trunk = f"{model.base_model_prefix}."
    heads = task in SCORED  # what lies outside the trunk is the head, which may be new
    allowed = (f"{trunk}pooler.",) if heads else {"encoder": ("pooler.",)}.get(task, ())
    bad = [name for name in missing if not name.startswith(allowed) and not (heads and not name.startswith(trunk))]
    if bad:
        shown = ", ".join(bad[:3]) + ", ..." * (len(bad) > 3)
        raise ModelError(f"{ref.ref} lacks {len(bad)} weights of {type(model).__name__}: {shown}",
                         remedy="give a whole checkpoint of this architecture, or another task")


def _draw(model: nn.Module, names: list[str], seed: int) -> None:
    """New weights: matrices normal with the config's `initializer_range`, biases 0, norms 1; from a generator of their own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", None) or 0.02
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
