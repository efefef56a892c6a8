"""Atomic folders and files, locks, safe names, disk errors, and the cache."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graftwork.files as files
from graftwork import cache
from graftwork.errors import GraftworkError, UsageError
from graftwork.files import FileLock, atomic_folder, atomic_write_text, disk_errors, safe_name

SOURCE = str(Path(files.__file__).parents[1])


def run(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": SOURCE},
                            stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_no_torch_at_import():
    code = ("import sys, graftwork.files, graftwork.cache, graftwork.modeling.models, graftwork.modeling.fingerprint;"
            "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))")
    assert run(code).wait() == 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "out"
    with pytest.raises(ValueError):
        with atomic_folder(target) as work:
            (work / "x").write_text("half")
            assert not target.exists()
            raise ValueError
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_folder(target) as work:
        (work / "deep").mkdir()
        (work / "deep" / "x").write_text("1")
    assert content(target) == {"deep/x": "1"}


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    target = tmp_path / "out"
    target.mkdir()  # an empty folder counts as free
    with atomic_folder(target) as work:
        (work / "old").write_text("1")
    with pytest.raises(GraftworkError, match="exists already"):
        with atomic_folder(target):
            pass
    with pytest.raises(KeyError):
        with atomic_folder(target, overwrite=True):
            raise KeyError
    assert content(target) == {"old": "1"}
    with atomic_folder(target, overwrite=True) as work:
        (work / "new").write_text("2")
        assert content(target) == {"old": "1"}
    assert content(target) == {"new": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_working_folder_is_never_overwritten(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("1")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for target in (tmp_path, ".."):
        with pytest.raises(GraftworkError, match="will not be overwritten"):
            with atomic_folder(target, overwrite=True):
                pass
    assert (tmp_path / "precious").exists()


def test_a_kill_inside_leaves_the_old_folder_and_the_next_writer_cleans_up(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as work:
        (work / "x").write_text("old")
    code = ("import os, sys, signal; from graftwork.files import atomic_folder\n"
            "with atomic_folder(sys.argv[1], overwrite=True) as work:\n"
            "    (work / 'x').write_text('new'); os.kill(os.getpid(), signal.SIGKILL)")
    assert run(code, str(target)).wait() == -signal.SIGKILL
    assert content(target) == {"x": "old"}
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process left
    with atomic_folder(target, overwrite=True) as work:
        (work / "x").write_text("newer")
    assert content(target) == {"x": "newer"} and len(list(tmp_path.iterdir())) == 1


def test_a_swap_cut_in_the_middle_is_put_back(tmp_path):
    process = run("pass")
    process.wait()
    aside = tmp_path / f".out.{files._host()}-{process.pid}-0123abcd.old"
    aside.mkdir()
    (aside / "x").write_text("old")
    files.sweep(tmp_path / "out")
    assert content(tmp_path / "out") == {"x": "old"} and not aside.exists()
    alive = tmp_path / f".out.{files._host()}-{os.getpid()}-0123abcd.tmp"
    elsewhere = tmp_path / f".out.000000-{process.pid}-0123abcd.tmp"
    alive.mkdir(), elsewhere.mkdir()
    files.sweep(tmp_path / "out")
    assert alive.exists() and elsewhere.exists()


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    target = tmp_path / "sub" / "f.txt"
    atomic_write_text(target, "ä\n")
    assert target.read_bytes() == "ä\n".encode()

    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GraftworkError, match="no space left"):
        atomic_write_text(target, "other")
    assert target.read_text() == "ä\n" and len(list(target.parent.iterdir())) == 1


@pytest.mark.parametrize("problem, words", [
    (OSError(errno.ENOSPC, "x"), "no space left"), (OSError(errno.EROFS, "x"), "Read-only"),
    (PermissionError(errno.EACCES, "x"), "denied"),
    (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
])
def test_disk_errors_name_the_path_and_a_remedy(tmp_path, problem, words):
    with pytest.raises(GraftworkError, match=words) as caught:
        with atomic_folder(tmp_path / "out"):
            raise problem
    assert "out" in caught.value.message and caught.value.remedy
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="mine"):
        with disk_errors(tmp_path):
            raise RuntimeError("mine")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    for target in (tmp_path / "f" / "out", tmp_path / "f" / "deeper" / "out"):
        with pytest.raises(GraftworkError, match="cannot write"):
            with atomic_folder(target):
                pass


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=12), st.text(alphabet="./\\~-_ aA1:\0", max_size=8),
                 st.sampled_from(["con", "nul.x", "..", ""])))
def test_only_plain_names_pass(name):
    try:
        passed = safe_name(name)
    except UsageError as error:
        suggestion = error.remedy.split("example ")[1].strip("'")
        assert safe_name(suggestion) == suggestion
    else:
        assert passed == name and name == os.path.basename(name) and name not in ("", ".", "..") and "\\" not in name
        assert not name.startswith((".", "-")) and not name.endswith(".")


@pytest.mark.parametrize("with_fcntl", [True, False])
def test_a_lock_excludes_names_its_holder_and_survives_its_death(tmp_path, monkeypatch, with_fcntl):
    path = tmp_path / "sub" / ".lock"
    prefix = "" if with_fcntl else "import graftwork.files as f; f.fcntl = None\n"
    if not with_fcntl:
        monkeypatch.setattr(files, "fcntl", None)
    code = prefix + ("import sys, time; from graftwork.files import FileLock\n"
                     "FileLock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)")
    process = run(code, str(path))
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(GraftworkError, match=f"the run is in use by process {process.pid}"):
            FileLock(path, what="the run").acquire()
    finally:
        process.kill()
        process.wait()
    with FileLock(path, timeout=5.0) as lock:  # nothing to clean up by hand
        assert lock.held and lock.holder() == os.getpid()
        with pytest.raises(GraftworkError):
            FileLock(path).acquire()
    assert not path.exists() and not lock.held


def test_a_lock_serialises_threads(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(5):
            with FileLock(tmp_path / "l", timeout=None):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(most) == 15 and max(most) == 1


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "c"))
    assert cache.cache_dir() == tmp_path / "c"
    monkeypatch.delenv("GRAFTWORK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_dir() == tmp_path / "x" / "graftwork"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG rule: ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "graftwork"


def test_cleaning_takes_what_is_ours_and_free(cached):
    assert cache.entries() == [] and cache.clean() == 0
    models = cache.cache_folder("models")
    for name, size in (("big", 3000), ("busy", 500)):
        (models / name).mkdir()
        (models / name / "w").write_bytes(b"x" * size)
    (cached / "photos").mkdir()
    (cached / "photos" / "p.jpg").write_bytes(b"x")
    cache.remember("digests", "k", lambda: 1)
    process = run("pass")
    process.wait()
    (models / f".gone.{files._host()}-{process.pid}-0123abcd.tmp").mkdir()
    found = cache.entries()
    assert [(e.name, e.bytes) for e in found[:2]] == [("models/big", 3000), ("models/busy", 500)] and len(found) == 3
    with cache.entry_lock(models / "busy", timeout=0.0):
        assert cache.clean() == 3000 + found[2].bytes
    assert [e.name for e in cache.entries()] == ["models/busy"]
    assert (cached / "photos" / "p.jpg").exists()
    assert (cached / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert cache.clean() == 500
    assert [p.name for p in models.iterdir()] == [".graftwork-cache"]


def test_values_are_computed_once_and_a_dead_cache_only_costs_time(cached, tmp_path, monkeypatch):
    calls = []
    for _ in range(2):
        assert cache.remember("digests", "key", lambda: calls.append(1) or {"a": 1}) == {"a": 1}
    assert len(calls) == 1
    for file in (cached / "digests").glob("*.json"):
        file.write_text("{")
    assert cache.remember("digests", "key", lambda: 2) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "file" / "x"))
    assert cache.remember("digests", "key", lambda: 3) == 3
    with pytest.raises(GraftworkError) as caught:
        cache.cache_folder("models")
    assert "GRAFTWORK_CACHE" in caught.value.remedy


def test_a_file_digest_follows_the_content(cached, tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    assert cache.file_digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    file.write_bytes(b"abcd")
    assert cache.file_digest(file) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
