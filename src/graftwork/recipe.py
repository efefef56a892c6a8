"""The typed recipe: one YAML document that names a choice on every axis.

Reading reports all problems of a document at once, each with file, line, nearest name and remedy. Sections are a name or a
mapping with `method`. Order: defaults < YAML < overrides (`train.max_steps=20`). Environment variables never choose.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import RecipeError, UsageError, nearest
from .recipe_rules import ALIASES, reasons_against
from .registry import MethodConfig, lookup

#: recipe section -> registry axis
SECTIONS = {"storage": "storage", "adapter": "adapter", "initializer": "initializer", "optimizer": "optimizer",
            "estimator": "estimator", "selection": "selection", "objective": "objective"}


class TrainConfig(BaseModel):
    """The run itself. precision bf16: frozen base and compute in bf16; learned tensors, gradients and state in fp32."""

    model_config = ConfigDict(extra="forbid")
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, description="optimizer steps; overrides epochs when positive")
    batch_size: int = Field(8, ge=1, description="rows per micro-batch")
    grad_accumulation: int = Field(1, ge=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.03, ge=0, description="below 1: share of all steps; else steps")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: int = Field(50, ge=0, description="0: only at the end")
    save_total_limit: int | None = Field(2, ge=1)
    eval_steps: int = Field(0, ge=0, description="0: only at the end, when there is eval data")
    logging_steps: int = Field(1, ge=1)
    early_stopping: int = Field(0, ge=0, description="stop after this many evaluations without a lower eval loss; 0: never")
    restore_best: bool = Field(False, description="end with the checkpoint of the lowest eval loss")
    report_to: list[Literal["jsonl", "tensorboard"]] = ["jsonl"]
    seed: int = 0


class Recipe(BaseModel):
    """A resolved recipe. Method sections hold the validated config object of the chosen method (or None)."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    model: str
    storage: MethodConfig
    adapter: MethodConfig | None
    adapter_from: str | None = None
    initializer: MethodConfig | None
    optimizer: MethodConfig | None
    estimator: MethodConfig
    selection: list[MethodConfig]
    objective: MethodConfig
    data: Any
    train: TrainConfig
    output_dir: str | None = None
    trust_remote_code: bool = False

    def document(self) -> dict[str, Any]:
        """Plain mapping that reads back to the same recipe (what `config.yaml` in the run folder holds)."""
        def section(config: MethodConfig | None) -> Any:
            return None if config is None else {"method": config.method, **config.model_dump(mode="json")}

        adapter = {"from": self.adapter_from} if self.adapter_from else section(self.adapter)
        # what is refused when it is set must not look as if it were set
        clips = lookup("estimator", self.estimator.method).traits["gradients"] or not self.train.max_grad_norm
        return {"model": self.model, "storage": section(self.storage), "adapter": adapter,
                "initializer": section(self.initializer), "optimizer": section(self.optimizer),
                "estimator": section(self.estimator), "selection": [section(s) for s in self.selection],
                "objective": section(self.objective), "data": self.data.model_dump(mode="json", exclude_none=True),
                "train": self.train.model_dump(mode="json", exclude=None if clips else {"max_grad_norm"}), "output_dir": self.output_dir,
                "trust_remote_code": self.trust_remote_code}

    def yaml(self) -> str:
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True)

    @property
    def is_fleet(self) -> bool:
        """True when data.train is a pattern of files: one adapter a file. A list of files is one data set."""
        train = self.data.train
        if isinstance(train, list) or not any(c in train for c in "*?["):
            return False
        hub_name = self.data.online and re.fullmatch(r"[\w.-]+/[\w.-]+(\[[^\]]+\])?(:\S+)?", train)
        return not hub_name and not os.path.isfile(train)


DEFAULTS: dict[str, Any] = {"storage": "dense", "adapter": "lora", "initializer": None, "optimizer": None,
                            "estimator": "backprop", "selection": [], "objective": "causal_lm", "train": {}}


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None, *, check: bool = True,
                notes: list[str] | None = None) -> Recipe:
    """Read a recipe from a YAML file or a mapping. `overrides`: `dotted.path=value`. notes: receives one line per accepted
    alias of another tool. Raises RecipeError with every problem; check=False skips the rules of combination."""
    reader = _Reader(source, notes if notes is not None else [])
    for override in overrides or []:
        reader.override(override)
    recipe = reader.build()
    if check:
        reasons = reasons_against(recipe)
        if reasons:
            raise RecipeError([f"{reader.where(path)}: {why}" for path, why, _ in reasons],
                              remedy="; ".join(dict.fromkeys(fix for _, _, fix in reasons)))
    return recipe


class _Reader:
    """One document on its way to a Recipe; remembers the line of every key."""

    def __init__(self, source: str | Path | dict[str, Any], notes: list[str]):
        self.problems: list[str] = []
        self.lines: dict[str, int] = {}
        self.overridden: dict[str, str] = {}
        self.notes = notes
        if isinstance(source, dict):
            self.file, self.document = "recipe", copy.deepcopy(source)
        else:
            self.file = str(source)
            self.document = self._parse(Path(source))
        self._aliases()

    def _parse(self, path: Path) -> dict[str, Any]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError([f"{path}: cannot be read ({error.strerror if isinstance(error, OSError) else error})"],
                              remedy="`graft init` writes a recipe that runs") from None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            document = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            raise RecipeError([f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}"],
                              remedy="check the indentation and the quotes near that line") from None
        if not isinstance(document, dict):
            kind = "empty" if document is None else type(document).__name__
            raise RecipeError([f"{path}:1: a recipe is a mapping, this is {kind}"],
                              remedy="`graft init` writes a recipe that runs")
        self._mark(node, "")
        return document

    def _mark(self, node: yaml.Node, path: str) -> None:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{path}.{key.value}" if path else str(key.value)
                if inner in self.lines:
                    self.problems.append(f"{self.file}:{key.start_mark.line + 1}: '{inner}' is given twice")
                self.lines[inner] = key.start_mark.line + 1
                self._mark(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._mark(value, f"{path}.{i}")

    def where(self, path: str) -> str:
        """`file:line` of a dotted path, or of its nearest parent; the override that set it, where there was one."""
        if path in self.overridden:
            return f"override {self.overridden[path]}"
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        line = self.lines.get(path)
        return f"{self.file}:{line}" if line else self.file

    def problem(self, path: str, text: str) -> None:
        self.problems.append(f"{self.where(path)}: {text}")

    def _aliases(self) -> None:
        for key in [k for k in self.document if k in ALIASES]:
            target, convert = ALIASES[key]
            value = self.document.pop(key)
            self.notes.append(f"{self.where(key)}: '{key}' is read as '{target}'")
            if self._given(target):
                self.problem(key, f"'{key}' and '{target}' say the same thing: remove one")
                continue
            self.lines.setdefault(target, self.lines.get(key, 0))
            try:
                self._take(target, convert(value))
            except UsageError as error:
                self.problem(key, error.message)

    def _given(self, path: str) -> bool:
        here: Any = self.document
        for part in path.split("."):
            if not isinstance(here, dict):
                return path.endswith(".method") and isinstance(here, str)
            if part not in here:
                return False
            here = here[part]
        return True

    def _take(self, target: str, value: Any) -> None:
        """Set what an alias means; full tuning is a method elsewhere, here it is no adapter."""
        if target == "adapter.method" and value is None:
            self._set("adapter", None)
        else:
            self._set(target, value)

    def _set(self, path: str, value: Any) -> None:
        *parents, last = path.split(".")
        here = self.document
        for i, part in enumerate(parents):
            inner = here.get(part)
            if isinstance(inner, str) and part in SECTIONS:
                inner = {"method": inner}
            elif part == "data" and isinstance(inner, (str, list)):
                inner = {"train": inner}
            elif inner is None:
                default = {**DEFAULTS, "optimizer": "adamw"}.get(part) if i == 0 else None
                inner = {"method": default} if isinstance(default, str) else {}
            elif isinstance(inner, list) and i == 0:  # selection.0.layers=1
                inner = {str(k): {"method": v} if isinstance(v, str) else v for k, v in enumerate(inner)}
            if not isinstance(inner, dict):
                raise UsageError(f"'{path}' cannot be set: '{part}' is {inner!r}", remedy="name an option below a section")
            here[part] = inner
            here = inner
        here[last] = value

    def override(self, text: str) -> None:
        path, sign, value = text.partition("=")
        if not sign or not path:
            raise UsageError(f"'{text}' is no override", remedy="write dotted.path=value, for example train.max_steps=20")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"override '{text}': the value is not YAML", remedy="put quotes around it") from None
        if path in ALIASES:
            path, convert = ALIASES[path]
            parsed = convert(parsed)
        self.overridden[path] = text
        self._take(path, parsed)

    # -- building ---------------------------------------------------------------------------------------------------
    def build(self) -> Recipe:
        document = {**DEFAULTS, **self.document}
        known = [*Recipe.model_fields]
        for key in [k for k in document if k not in known]:
            self.problem(str(key), f"unknown key '{key}'{nearest(str(key), [*known, *ALIASES])}; keys: {', '.join(known)}")
        fields: dict[str, Any] = {}
        if not isinstance(document.get("model"), str):
            self.problem("model", "'model' is missing: a packaged name, a folder, a .gguf file or a Hub id")
        fields["model"] = document.get("model")
        adapter = document.get("adapter")
        if isinstance(adapter, dict) and "from" in adapter:
            fields["adapter_from"] = str(adapter["from"])
            document["adapter"] = self._saved_adapter(adapter)
        if document["initializer"] in ("default", {"method": "default"}):
            document["initializer"] = None
        for name, axis in SECTIONS.items():
            value = document.get(name)
            if name == "initializer" and name not in self.document and "adapter_from" not in fields and fields["adapter"]:
                # the start that belongs to the method, unless the recipe names one (default: the adapter's own)
                value = lookup("adapter", fields["adapter"].method).traits.get("initializer")
            if name == "selection":
                if isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
                    value = list(value.values())
                value = [] if value is None else value if isinstance(value, list) else [value]
                fields[name] = [m for i, v in enumerate(value) if (m := self._method(f"{name}.{i}", axis, v)) is not None]
            elif isinstance(value, MethodConfig):
                fields[name] = value
            else:
                fields[name] = self._method(name, axis, value)
        if fields["optimizer"] is None and not any(self.where("optimizer") in p for p in self.problems):
            estimator = fields.get("estimator")
            if estimator is None or lookup("estimator", estimator.method).traits.get("gradients", True):
                fields["optimizer"] = self._method("optimizer", "optimizer", "adamw")
        fields["data"] = self._data(document.get("data"), fields.get("objective"))
        fields["train"] = self._typed("train", TrainConfig, document.get("train") or {})
        fields["output_dir"] = document.get("output_dir")
        fields["trust_remote_code"] = bool(document.get("trust_remote_code", False))
        if self.problems:
            raise RecipeError(self.problems)
        return Recipe.model_construct(**fields)

    def _saved_adapter(self, section: dict[str, Any]) -> MethodConfig | None:
        from .artifact import read_card
        from .errors import GraftworkError
        from .registry import make_config

        extra = [k for k in section if k != "from"]
        if extra:
            self.problem("adapter", f"adapter.from continues a saved graft with its own options; remove {', '.join(extra)}")
        try:
            folder = Path(str(section["from"]))
            if (folder / "adapter_config.json").exists() and not (folder / "graft.json").exists():
                from .interchange.peft import read_config

                return read_config(folder)
            card = read_card(folder)
            return make_config("adapter", card["method"], **card["config"])
        except GraftworkError as error:
            self.problem("adapter.from", str(error))
            return None

    def _method(self, path: str, axis: str, value: Any) -> MethodConfig | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, dict):
            self.problem(path, f"'{path}' is a name or a mapping with 'method', not {value!r}")
            return None
        options = dict(value)
        name = options.pop("method", None)
        if name is None:
            self.problem(path, f"'{path}' has no 'method'{' (did you mean method for name?)' if 'name' in options else ''}")
            return None
        try:
            info = lookup(axis, str(name))
        except UsageError as error:
            self.problem(f"{path}.method" if f"{path}.method" in self.lines else path, f"{error.message}; {error.remedy}")
            return None
        presets = getattr(info.cls, "presets", {}).get(str(name), {})
        return self._typed(path, info.config, {**presets, **options})

    def _data(self, value: Any, objective: MethodConfig | None) -> Any:
        """The section; `auto` is the format that the objective wants, if it wants one."""
        from .data.config import DataConfig

        if isinstance(value, (str, list)):
            value = {"train": value}
        if not isinstance(value, dict):
            self.problem("data", "'data' is missing: data: {train: FILE.jsonl}")
            return None
        wanted = objective and lookup("objective", objective.method).traits.get("format")
        if wanted and value.get("format", "auto") == "auto":
            value = {**value, "format": wanted}
        return self._typed("data", DataConfig, value)

    def _typed(self, path: str, cls: type[BaseModel], options: Any) -> Any:
        if not isinstance(options, dict):
            self.problem(path, f"'{path}' must be a mapping, not {options!r}")
            return None
        try:
            return cls(**{str(k): v for k, v in options.items()})
        except ValidationError as error:
            for each in error.errors():
                key = ".".join(str(part) for part in each["loc"])
                inner = f"{path}.{each['loc'][0]}" if each["loc"] else path
                if each["type"] == "extra_forbidden":
                    self.problem(inner, f"unknown key '{path}.{key}'{nearest(key, cls.model_fields)}; "
                                        f"keys: {', '.join(cls.model_fields) or 'none'}")
                elif each["type"] == "missing":
                    self.problem(path, f"'{path}.{key}' is missing")
                else:
                    self.problem(inner, f"{path}.{key}: {each['msg']} (given: {each['input']!r})")
            return None
