"""Files that are either whole or absent: atomic folders and files, locks between processes, safe names, disk errors.

Whatever a run leaves on disk goes through here, so that a kill at any moment leaves either the old content or the new
one. Standard library only; importing this costs nothing.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import GraftworkError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_PATH = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.EIO}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers report what the system said


@contextmanager
def disk_errors(path: str | Path, *, remedy: str | None = None) -> Iterator[None]:
    """Turns a full disk, a missing permission or an impossible path into one GraftworkError that names `path`.

    Other exceptions pass unchanged. `remedy` replaces the default advice.
    """
    try:
        yield
    except GraftworkError:
        raise
    except Exception as error:
        found = _RUST_ERRNO.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
        if code in _NO_SPACE:
            free = _free_bytes(Path(path))
            raise GraftworkError(f"no space left while writing {path} ({free / 2**20:.0f} MiB free)",
                                 remedy=remedy or "free some space (`graft doctor` shows the cache) or choose another folder"
                                 ) from error
        if code in _NOT_ALLOWED:
            raise GraftworkError(f"cannot write {path}: {os.strerror(code)}",
                                 remedy=remedy or "choose a folder you may write to, or mend its permissions") from error
        if code in _BAD_PATH:
            raise GraftworkError(f"cannot write {path}: {os.strerror(code)}",
                                 remedy=remedy or "choose another path") from error
        raise


def _free_bytes(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def safe_name(name: str, what: str = "name") -> str:
    """`name` itself, if it can be one path component on every system; raises UsageError otherwise.

    Letters, digits, `_`, `-`, `.` (not first, not last), at most 100 characters, no device name of Windows.
    """
    cleaned = re.sub(r"[^\w.-]+", "-", str(name)).strip(".-")[:100] or "a"
    devices = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))}
    if str(name).split(".")[0].lower() in devices:
        cleaned = f"{name.split('.')[0]}-1"
    if cleaned != name:
        raise UsageError(f"{what} {name!r} cannot be used as a file name",
                         remedy=f"use letters, digits, '_', '-' and '.', for example {cleaned!r}")
    return cleaned


def process_alive(pid: int) -> bool:
    """Whether a process of this id exists on this machine."""
    if pid <= 0:
        return False
    if os.name == "nt":  # os.kill(pid, 0) would send it Ctrl-C there
        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def folder_bytes(path: str | Path) -> int:
    """Bytes of all regular files under `path`, links not followed; 0 when it does not exist."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(f.lstat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    return hashlib.sha1(socket.gethostname().encode()).hexdigest()[:6]


def _beside(path: Path, kind: str) -> Path:
    """A new name next to `path` that tells who made it, so that the leftovers of a killed process can be removed."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{os.urandom(4).hex()}.{kind}")


def sweep(path: str | Path) -> None:
    """Removes what killed processes of this machine left beside `path`; puts back an old folder whose swap was cut."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}-(\d+)-[0-9a-f]{{8}}\.(tmp|old)")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        found = pattern.fullmatch(other.name)
        if not found or process_alive(int(found.group(1))):
            continue
        if found.group(2) == "old" and not path.exists():
            os.rename(other, path)
        else:
            remove_path(other)


def remove_path(path: Path) -> None:
    """Deletes a file, a link or a folder with its content; nothing happens when it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one system call (Linux); False where that does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success everything is synced and it becomes `path` by a rename.

    An exception inside leaves `path` as it was. With `overwrite`, an existing folder is swapped out and then deleted.
    Raises GraftworkError when `path` holds something (and `overwrite` is not given) and for a full or read-only disk.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if occupied and not overwrite:
            raise GraftworkError(f"{path} exists already", remedy="choose another folder, or allow it to be overwritten")
        if occupied and (not path.is_dir() or any(place.is_relative_to(path.resolve()) for place in (Path.cwd(), Path.home()))):
            raise GraftworkError(f"{path} will not be overwritten: it is a file, or holds the working or home folder",
                                 remedy="choose another folder")
        temporary = _beside(path, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for each in sorted(temporary.rglob("*"), reverse=True):
                if not each.is_symlink():
                    _fsync(each)
            _fsync(temporary)
            _replace_folder(temporary, path)
            _fsync(path.parent)
        finally:
            remove_path(temporary)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if path.exists():
            path.rmdir()
        os.rename(new, path)
    elif not _exchange(new, path):  # after an exchange `new` names the old content, which the caller removes
        aside = _beside(path, "old")
        os.rename(path, aside)
        os.rename(new, path)
        remove_path(aside)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields the name of a temporary file beside `path`; on success it is synced and becomes `path` by a rename."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file by a temporary one and a rename; readers see the old content or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


class FileLock:
    """An exclusive lock between processes (and between two FileLock objects of one process), with the holder's id inside.

    The system drops it when the holder dies, so there is nothing stale to clean up; without `fcntl` the id in the file
    is checked instead. `timeout`: seconds to wait, 0 tries once, None waits for ever. `what` words the error.
    """

    def __init__(self, path: str | Path, *, timeout: float | None = 0.0, what: str = "this folder"):
        self.path = Path(path)
        self.timeout = timeout
        self.what = what
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None

    def holder(self) -> int | None:
        """The process id written in the lock file, None if there is none."""
        try:
            return int(self.path.read_text().strip() or 0) or None
        except (OSError, ValueError):
            return None

    def acquire(self) -> FileLock:
        """Takes the lock. Raises GraftworkError naming the holder when it stays taken for `timeout` seconds."""
        if self.held:
            raise RuntimeError(f"{self.path} is held by this object already")
        start = time.monotonic()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not (self._try_flock() if fcntl else self._try_exclusive()):
                if self.timeout is not None and time.monotonic() - start >= self.timeout:
                    raise GraftworkError(f"{self.what} is in use by process {self.holder() or 'unknown'} ({self.path})",
                                         remedy="wait until it has finished, or stop it")
                time.sleep(0.05)
        return self

    def _try_flock(self) -> bool:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder removes the file when it is done: a lock on a removed file is worth nothing
            if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                self._handle, handle = handle, None
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            if handle is not None:
                os.close(handle)
        return self.held

    def _try_exclusive(self) -> bool:
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            pid = self.holder()
            if pid is not None and not process_alive(pid):
                self.path.unlink(missing_ok=True)
            return False
        os.write(self._handle, str(os.getpid()).encode())
        return True

    def release(self) -> None:
        """Gives the lock back and removes its file; nothing happens when it is not held."""
        if not self.held:
            return
        handle, self._handle = self._handle, None
        if fcntl:
            self.path.unlink(missing_ok=True)
            fcntl.flock(handle, fcntl.LOCK_UN)  # explicit: a forked child may still hold a copy of the handle
            os.close(handle)
        else:
            os.close(handle)
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> FileLock:
        return self.acquire()

    def __exit__(self, *problem) -> None:
        self.release()
