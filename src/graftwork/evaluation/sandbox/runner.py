"""Runs Python programs that nobody has read, each in a process of its own that has given up its rights (confine.py).

Isolated Python (`-I`), an empty environment, a temporary folder as working directory and only writable place, limits of time, processor
time, memory and file size, no network, no other processes. The process leads a group of its own, which is killed when the program has
ended or its time is up. What a sandbox in the same kernel cannot promise: that the kernel has no hole, and that a program that looks for
the token of its parent among its own frames does not report a success it did not have. Files that the user may read can be read.

Off unless the caller says that it is allowed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import IncompatibleError, UsageError

_INSIDE = Path(__file__).with_name("inside.py")
_MOST_READ = 65_536


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end. reason: the exception, "time", "killed by signal N" or "left early". layers: in force."""

    passed: bool
    reason: str | None = None
    layers: tuple[str, ...] = ()


def check_allowed(allowed: bool) -> None:
    """Raises UsageError unless running code was allowed, IncompatibleError where there is no sandbox at all."""
    if not allowed:
        raise UsageError("pass_at_k runs programs that the model writes, on this machine; that is off by default",
                         remedy="read docs/evaluation.md on what the sandbox keeps out, then add --allow-code-execution")
    if os.name != "posix":
        raise IncompatibleError("programs can be limited on Linux and macOS only", remedy="run pass_at_k there, or in a container")


def run_program(source: str, *, allowed: bool, seconds: float = 10.0, memory_mib: int = 1024, landlock: bool = True,
                seccomp: bool = True) -> Outcome:
    """Runs one program. landlock, seccomp: False leaves the layer out (for tests of the others)."""
    check_allowed(allowed)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="graftwork-code-", ignore_cleanup_errors=True) as outer:
        folder = Path(outer, "work")
        folder.mkdir()
        order = {"token": token, "folder": str(folder), "seconds": seconds, "memory": memory_mib << 20, "landlock": landlock,
                 "seccomp": seccomp}
        orders, answers = Path(outer, "in"), Path(outer, "out")
        orders.write_bytes(json.dumps(order).encode() + b"\n" + source.encode(errors="replace"))
        with open(orders, "rb") as given, open(answers, "wb") as taken:
            process = subprocess.Popen([sys.executable, "-I", str(_INSIDE)], stdin=given, stdout=taken, stderr=subprocess.DEVNULL,
                                       cwd=folder, env=_environment(folder), start_new_session=True)
            late = _wait(process, seconds)
        with open(answers, "rb") as file:
            said = file.read(_MOST_READ)
    try:
        answer = json.loads(said)
    except ValueError:
        answer = {}
    if answer.get("token") == token:
        return Outcome(answer["error"] is None, answer["error"], tuple(answer["layers"]))
    code = process.returncode
    return Outcome(False, "time" if late else f"killed by signal {-code}" if code < 0 else "left early")


def run_programs(sources: Sequence[str], *, workers: int = 1, progress: Callable[[int, int], None] | None = None,
                 **options) -> list[Outcome]:
    """Outcomes in order; `workers` processes at a time. Options as in run_program."""
    check_allowed(options.get("allowed", False))
    found: list[Outcome] = []
    if progress:
        progress(0, len(sources))
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for outcome in pool.map(lambda source: run_program(source, **options), sources):
            found.append(outcome)
            if progress:
                progress(len(found), len(sources))
    return found


def missing(layers: Sequence[str]) -> list[str]:
    """What the layers in force do not keep out, in words."""
    out = []
    if "seccomp" not in layers:
        out.append("network, processes and files outside the folder are kept out by Python itself only, which native code gets past")
    elif "landlock" not in layers:
        out.append("this kernel cannot tell folders apart, so programs cannot write any file")
    return out


def _environment(folder: Path) -> dict[str, str]:
    one = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", **one}


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Waits for the end of the process or of its time; then kills its group, reaps it, and says whether it was late."""
    end, pause, ended = time.monotonic() + seconds, 0.002, False
    while not ended and time.monotonic() < end:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not ended:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # before it is reaped, so the number is still its own
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    return not ended
