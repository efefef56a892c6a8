"""Answers that are written already: one JSON line each, so that a long evaluation goes on where it was interrupted.

A line is found again by a digest of everything that decides it: the target (`identity`: model, storage, contents of the grafts), the
graft, the prompt's tokens, the settings of decoding, the number of the sample. Lines of another setting are never taken; a last line that
was cut off is ignored. Without a path nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..files import disk_errors


class Journal:
    def __init__(self, path: Path | None, identity: str = ""):
        self.path, self.identity, self.known = path, identity, {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry.pop("key")] = entry
                except (ValueError, KeyError, AttributeError):
                    continue

    def key(self, *parts: Any) -> str:
        return hashlib.sha256(json.dumps([self.identity, *parts], ensure_ascii=False).encode()).hexdigest()[:32]

    def add(self, entries: dict[str, dict[str, Any]]) -> None:
        """Remembers {key: fields}; they are on disk when this returns."""
        self.known.update(entries)
        if self.path is None:
            return
        with disk_errors(self.path):
            torn = self.path.is_file() and self.path.stat().st_size and not self.path.read_bytes()[-1:] == b"\n"
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * torn + "".join(json.dumps({"key": key, **fields}, ensure_ascii=False) + "\n"
                                                 for key, fields in entries.items()))
                file.flush()
