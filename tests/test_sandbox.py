"""The sandbox: what a program may do, what it may not, and that it ends. Every program here is run for real."""

import os
import sys
from pathlib import Path

import pytest

from graftwork.errors import UsageError
from graftwork.evaluation.sandbox import confine, runner
from graftwork.evaluation.sandbox.runner import missing, run_program, run_programs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")]
LONG = 120.0  # seconds: the machine may be busy


def run(source, **options):
    return run_program(source, allowed=True, **{"seconds": LONG, **options})


def test_off_unless_allowed(monkeypatch):
    monkeypatch.setattr(runner.subprocess, "Popen", None)  # nothing may be started
    for call in (run_program, lambda source, **o: run_programs([source], **o)):
        with pytest.raises(UsageError, match="off by default") as caught:
            call("assert True", allowed=False)
    assert "--allow-code-execution" in caught.value.remedy


def test_passes_fails_and_leaves_early():
    assert run("assert 1 + 1 == 2\nprint('seen by nobody')").passed
    failed = run("assert False, 'why'")
    assert not failed.passed and failed.reason == "AssertionError: why" and "limits" in failed.layers
    assert "SyntaxError" in run("def").reason
    for source in ("import os\nos._exit(0)", "raise SystemExit(0)", "import os\nos.close(3)\nos.close(4)\nos.close(5)\nos._exit(0)"):
        assert not run(source).passed, source
    forged = 'import os, json\nfor fd in range(3, 9):\n  try: os.write(fd, b\'{"token": "x", "layers": [], "error": null}\')\n' \
             "  except OSError: pass\nos._exit(0)"
    assert not run(forged).passed
    assert not run("class E(Exception):\n  def __str__(self): raise self\nraise E").passed


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("GRAFT_SECRET", "x")
    monkeypatch.setenv("PYTHONSTARTUP", "/x")
    assert run("import os, sys\nassert 'GRAFT_SECRET' not in os.environ and sys.flags.isolated\n"
               "assert os.getcwd() == os.environ['HOME'] and os.listdir() == []\nassert sys.stdin.read() == ''").passed


def test_endless_loops_are_killed():
    assert run("while True: pass", seconds=1.5).reason == "time"
    assert run("import time\ntime.sleep(600)", seconds=1.5).reason == "time"
    held = "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n" \
           "while True: pass"
    assert run(held, seconds=1.5).reason == "time"


def test_processor_time_is_limited():
    """As the kernel has it; seconds are rounded up."""
    source = "line = next(s for s in open('/proc/self/limits') if s.startswith('Max cpu time'))\n" \
             "assert line.split()[3:5] == ['62', '62'], line"
    assert run(source, seconds=61.5).passed


def test_memory_is_limited():
    assert "MemoryError" in run("x = bytearray(2 << 30)").reason
    assert run("x = bytearray(100 << 20)").passed
    assert not run("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_mib=256).passed


@pytest.mark.parametrize("layers", [{}, {"landlock": False}, {"seccomp": False}])
def test_no_network(layers):
    assert "Error" in run("import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)", **layers).reason
    assert "PermissionError" in run("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", **layers).reason
    if "seccomp" not in layers:  # the kernel says so, not Python
        assert run("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
                   "assert libc.socket(2, 1, 0) == -1 and ctypes.get_errno() == 1\nassert libc.syscall(425, 8, bytes(256)) == -1").passed
        assert run("import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3").passed


@pytest.mark.parametrize("layers", [{}, {"seccomp": False}])
def test_no_other_processes(layers):
    for source in ("import os\nos.fork()", "import subprocess\nsubprocess.run(['true'])", "import os\nos.execv('/bin/true', ['true'])",
                   "import os\nos.kill(os.getppid(), 9)"):
        assert "PermissionError" in run(source, **layers).reason, source


def test_fork_bombs_end():
    """Through libc, so that Python's own refusal is not asked; the parent's count of processes is what it was."""
    bomb = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor _ in range(1000): assert libc.fork() == -1\n" \
           "assert libc.vfork() == -1 and libc.syscall(56, 17, 0, 0, 0, 0) == -1 and libc.syscall(435, bytes(88), 88) == -1"
    assert run(bomb).passed
    threads = "import threading, time\nn = 0\ntry:\n" \
              "  for n in range(5000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n" \
              "except (RuntimeError, MemoryError): pass\nassert 0 < n < 300, n"
    assert run(threads).passed


@pytest.mark.parametrize("layers", [{}, {"landlock": False}, {"seccomp": False}])
def test_nothing_outside_is_written(tmp_path, layers):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    before = kept.stat()
    for action in ("open(p, 'w')", "open(p, 'a')", "open(p, 'r+')", "os.truncate(p, 0)", "os.remove(p)", "os.rename(p, p + '2')",
                   "os.chmod(p, 0)", "os.utime(p, (0, 0))", "os.mkdir(p + 'd')", "os.symlink(p, p + 'l')", "os.link(p, p + 'h')",
                   "os.rename('own', p) if open('own', 'w') else 0", "os.link(p, 'own'); open('own', 'w')"):
        outcome = run(f"import os\np = {str(kept)!r}\n{action}", **layers)
        assert not outcome.passed, action
    after = kept.stat()
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, 1)
    inside = run("open('x', 'w').write('a')\nassert open('x').read() == 'a'\nimport os\nos.remove('x')", **layers)
    assert inside.passed != ("landlock" in layers)  # without it nothing can be written at all, and that is said
    assert "cannot write any file" in missing(["limits", "seccomp"])[0] and "native code" in missing(["limits", "hook"])[0]
    assert missing(["limits", "seccomp", "landlock"]) == []


def test_size_of_files_is_limited():
    assert "File too large" in run("open('x', 'wb').write(bytes(9 << 20))").reason


def test_rights_of_root_are_gone():
    source = "import os\ntry: os.setuid(12345)\nexcept OSError: pass\nelse: raise AssertionError\n" \
             "assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()\n" \
             "assert '\\nNoNewPrivs:\\t1' in open('/proc/self/status').read()"
    assert run(source).passed, run(source).reason


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(runner.tempfile, "tempdir", None)
    outcomes = run_programs(["open('x', 'w')", "import os\nos.makedirs('a/b')\nassert False", "while True: pass"], workers=2, allowed=True,
                            seconds=8.0)
    assert [o.passed for o in outcomes] == [True, False, False] and list(tmp_path.iterdir()) == []


def test_every_refused_call_has_numbers():
    numbers = [pair for table in (confine._REFUSED, confine._WRITING) for pair in table.values()]
    for column in (0, 1):
        known = [pair[column] for pair in numbers if pair[column] is not None]
        assert len(known) == len(set(known))
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if header.is_file():
        defined = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
        for name, pair in {**confine._REFUSED, **confine._WRITING}.items():
            assert int(defined.get(f"__NR_{name}", pair[0])) == pair[0], name
    header = Path("/usr/include/asm-generic/unistd.h")
    if header.is_file():
        lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
        defined = dict(parts[1:3] for parts in lines if len(parts) > 2)
        for name, pair in {**confine._REFUSED, **confine._WRITING}.items():
            if pair[1] is not None and defined.get(f"__NR_{name}", "").isdecimal():
                assert int(defined[f"__NR_{name}"]) == pair[1], name
