"""`graft serve --replicas 2` for real: two servers under Ray behind one address. Run by `make test-ray`."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="make test-ray")

import graftwork
import tiny
from graftwork.serving.affinity import ranking
from graftwork.serving.generate import generate
from test_engine import saved_adapters
from test_http import TEXT, events

NAMES = ["a0", "a1"]
ASKED = {"prompt": TEXT, "max_tokens": 100, "temperature": 0, "stream": True}
MARK = "GRAFTWORK_TEST_FLEET"


class Server:
    """A server started by the command line; its lines on stderr."""

    def __init__(self, *options):
        self.mark, self.lines = uuid.uuid4().hex, []
        command = [sys.executable, "-m", "graftwork.cli.main", "serve", "--port", "0", "--pool", "1MiB", "--replicas", "2", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                                        env={**os.environ, MARK: self.mark})
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def address(self):
        while self.process.poll() is None:
            found = [match for line in list(self.lines) if (match := re.search(r"listening on (http://\S+)", line))]
            if found:
                return found[0][1]
            time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def replicas(self):
        """Process ids of the replicas, and of everything else that was started."""
        found, others = [], []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    name = (folder / "cmdline").read_bytes()
                    (found if name.startswith(b"ray::Process.run") else others).append(int(folder.name))
            except OSError:
                continue
        return found, others

    def end(self):
        for pid in (self.process.pid, *sum(self.replicas(), [])):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        self.reader.join()


def until(holds, seconds=300):
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """(base folder, adapters folder, {name: greedy answer of each alone})."""
    root, model, answers = tmp_path_factory.mktemp("ray"), tiny.llama(), {}
    base, folder = tiny.save(model, root / "tiny"), root / "fleet"
    folder.mkdir()
    saved_adapters(folder, model, 3)
    for name in ("tiny", "a0", "a1", "a2"):
        graft = None if name == "tiny" else graftwork.attach_saved(model, folder / name, name="one")
        answers[name] = generate(model, tiny.tokenizer(), [TEXT], adapters=["one" if graft else None], max_new_tokens=100)[0].text
        if graft:
            graft.detach()
    shutil.move(folder / "a2", root / "later")
    shutil.copytree(root / "later", folder / "apart" / "later")
    return base, folder, answers


def ask(client, model, **fields):
    return client.post("/v1/completions", json={**ASKED, "model": model, **fields})


def text_of(response):
    assert response.status_code == 200, response.text
    return "".join(c["choices"][0]["text"] for c in events(response.text))


def sample(client, name, **labels):
    """The sum of the samples with these labels at /metrics."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(each in line for each in wanted))


def test_two_replicas(fleet, tmp_path):
    base, folder, answers = fleet
    keys = tmp_path / "keys"
    row = {"name": "all", "sha256": hashlib.sha256(b"secret").hexdigest(), "manage": True, "requests_per_minute": 1000}
    keys.write_text(json.dumps(row))
    home = {name: ranking(name, range(2))[0] for name in NAMES}
    assert set(home.values()) == {0, 1}
    server = Server("--model", str(base), "--adapters", str(folder), "--api-keys", str(keys), "--allow-load")
    try:
        with httpx.Client(base_url=server.address(), timeout=300, headers={"authorization": "Bearer secret"}) as client:
            # right answers, streamed in pieces, each from its adapter's replica
            for name in (*NAMES, *NAMES, "tiny"):
                got = ask(client, name)
                assert text_of(got) == answers[name] and len(events(got.text)) > 10
                assert name not in home or got.headers["x-graftwork-replica"] == str(home[name])
            for name in NAMES:
                assert sample(client, "graftwork_requests_total", adapter=name, replica=home[name]) == 2
                assert sample(client, "graftwork_requests_total", adapter=name) == 2
            assert ask(client, "zz").status_code == 404
            assert httpx.post(f"{client.base_url}/v1/completions", json={"model": "a0", "prompt": "x"}).status_code == 401

            # what one replica loads the other offers
            name = next(each for each in map("new{}".format, range(100)) if ranking(each, range(2))[0] == 1)
            loaded = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "apart/later"})
            assert loaded.status_code == 200 and loaded.headers["x-graftwork-replica"] == "1", loaded.text
            listed = client.get(f"/v1/models/{name}")
            assert listed.status_code == 200 and listed.headers["x-graftwork-replica"] == "0", "the other replica knows it"
            assert text_of(ask(client, name)) == answers["a2"]

            # one ends: the other takes its adapters, and it is started again
            victims, _ = server.replicas()
            assert len(victims) == 2
            os.kill(victims[0], signal.SIGKILL)
            for _ in range(3):
                assert {name: text_of(ask(client, name)) for name in NAMES} == {name: answers[name] for name in NAMES}
            assert until(lambda: sample(client, "graftwork_replica_starts") == 3 and sample(client, "graftwork_replica_up") == 2)
            fresh, _ = server.replicas()
            assert len(fresh) == 2 and victims[0] not in fresh and victims[1] in fresh
            for name in (*NAMES, *NAMES):
                got = ask(client, name)
                assert text_of(got) == answers[name] and got.headers["x-graftwork-replica"] == str(home[name])
            assert client.get("/v1/models/" + next(n for n in ("new0", "new1", "new2") if ranking(n, range(2))[0] == 1)).status_code == 200

            # SIGTERM: an answer that is being written ends first
            with client.stream("POST", "/v1/completions", json={**ASKED, "model": "a0"}) as response:
                text = ""
                for piece in response.iter_text():
                    if not text:
                        server.process.send_signal(signal.SIGTERM)
                    text += piece
            assert "".join(c["choices"][0]["text"] for c in events(text)) == answers["a0"]
        assert server.process.wait(60) == 0
        server.reader.join(10)
        assert server.lines[-1] == "stopped\n"
        requests = [json.loads(line) for line in server.lines if line.startswith('{"time"') and '"request"' in line]
        assert any(line.get("replica") == home["a0"] and line["model"] == "a0" and line["key"] == "all" for line in requests)
        assert until(lambda: server.replicas() == ([], [])), "nothing is left"
    finally:
        server.end()
