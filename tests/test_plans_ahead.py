"""Plans in processes of their own: the same results, whatever happens to the processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from graftwork.files import process_alive
from graftwork.planning import search
from graftwork.planning.ahead import Ahead
from graftwork.recipe import load_recipe
from test_advise import AMONG, FLAT

pytestmark = pytest.mark.slow


def process(document, device):
    """A planner that tells where it ran."""
    if document.get("wrong"):
        raise ValueError(document["wrong"])
    if document.get("die_beside") not in (None, os.getpid()):
        os._exit(9)
    if path := document.get("stay"):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    return {"process": os.getpid(), "device": device, "document": document}


def running(pid):
    """Whether there is such a process, one that has ended and waits to be reaped not counted."""
    stat = Path(f"/proc/{pid}/stat")
    return process_alive(pid) and not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def gone(pid, seconds=60):
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def stayed(path, seconds=120):
    """The process that wrote its number."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    return int(path.read_text())


def test_what_is_expected_is_made_elsewhere_and_the_rest_here(tmp_path):
    with Ahead(process, jobs=2) as ahead:
        ahead.expect({"n": 1}, "cpu")
        ahead.expect({"wrong": "no such thing"}, "cpu")
        ahead.expect({"stay": str(tmp_path / "pid")}, "cpu")
        assert ahead({"n": 1}, "cpu")["process"] != os.getpid() == ahead({"n": 2}, "cpu")["process"]
        assert ahead({"n": 1}, "cuda")["device"] == "cuda"
        with pytest.raises(ValueError, match="no such thing"):
            ahead({"wrong": "no such thing"}, "cpu")
        worker = stayed(tmp_path / "pid")
    assert gone(worker)  # in the middle of a plan that nobody asked for


def test_a_killed_process_costs_only_its_help():
    with Ahead(process, jobs=2) as ahead:
        mortal = {"die_beside": os.getpid()}
        ahead.expect(mortal, "cpu")
        assert ahead(mortal, "cpu")["process"] == os.getpid()
        ahead.expect({"n": 1}, "cpu")
        assert ahead({"n": 1}, "cpu")["process"] == os.getpid()


def test_processes_leave_when_the_search_is_killed(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_plans_ahead import process
from graftwork.planning.ahead import Ahead
if __name__ == "__main__":
    with Ahead(process, jobs=2) as ahead:
        ahead.expect({{"stay": {str(tmp_path / "pid")!r}}}, "cpu")
        ahead({{"stay": {str(tmp_path / "pid")!r}}}, "cpu")
""")
    parent = subprocess.Popen([sys.executable, str(script)])
    worker = stayed(tmp_path / "pid")
    parent.kill()
    parent.wait()
    assert gone(worker)


def test_a_search_finds_the_same_with_one_process_and_with_two(tmp_path, monkeypatch):
    folder = tiny.save(tiny.llama(), tmp_path / "model")
    recipe = load_recipe({"model": str(folder), "data": {"train": "x.jsonl", "max_length": 16},
                          "train": {"batch_size": 2, "precision": "fp32", "max_steps": 5}})
    found = []
    for jobs in (1, 2):
        monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / f"cache{jobs}"))
        made = search.advise(recipe, budget=10**9, device="cpu", roofline=FLAT, among=AMONG, plans=3, jobs=jobs)
        found.append(made.to_json() | {"tried": [search.describe(row.candidate) for row in made.planned]})
    assert found[0] == found[1] and found[0]["planned"] == 3
