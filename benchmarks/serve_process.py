"""`graft serve` as a process, for serving_load.py and the tests."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: seconds until it has to listen
PATIENCE = 300.0


class Server:
    """A `graft serve` process, from the line in which it says that it listens to its end. log: file of what it writes. files: how many
    files a process may open before it asks for more (the soft limit); None: as here. Raises RuntimeError when it does not start."""

    def __init__(self, arguments: Sequence[str], log: Path, *, files: int | None = None):
        self.log = log
        command = [sys.executable, "-m", "graftwork.cli.main", "serve", *arguments]
        if files is not None:
            command = ["/bin/sh", "-c", f'ulimit -Sn {files} && exec "$@"', "sh", *command]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + PATIENCE
        while not (found := re.search(r"listening on (\S+)", log.read_text())):
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise RuntimeError(f"the server does not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.url = found[1]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def rss(self) -> int:
        """Bytes of memory in use."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far."""
        import psutil

        spent = psutil.Process(self.process.pid).cpu_times()
        return spent.user + spent.system
