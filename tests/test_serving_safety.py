"""Names and folders that lead elsewhere are refused, and nothing outside of the allowed folders is opened on the way."""

import asyncio
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import httpx
import pytest

import tiny
from graftwork.serving.http.adapters import BOOK
from test_engine import saved_adapters
from test_http import complete, error_of, make_app, text_of

pytestmark = pytest.mark.slow

opened: list[str] | None = None


def _listen(event, arguments):
    if opened is not None and event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and "\0" not in os.fsdecode(path):
            opened.append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_listen)  # for good: Python has no way to take one back, so it looks at `opened`


@pytest.fixture
def watched():
    """Paths, links followed, that are opened or listed during the test."""
    global opened
    opened = []
    yield opened
    opened = None


class Bomb:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return Path.touch, (Path(self.trace),)


@pytest.fixture
def places(tmp_path):
    """fleet: a0 and folders that are traps; allowed: another folder to load from; outside: what must not be touched."""
    fleet, allowed, outside = tmp_path / "fleet", tmp_path / "allowed", tmp_path / "outside"
    saved_adapters(fleet, tiny.llama(), 1)
    shutil.copytree(fleet / "a0", outside / "secret")
    shutil.copytree(fleet / "a0", allowed / "good")
    (outside / BOOK).write_text("{}")
    for name, content in (("pickle", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}), ("remote", {
            "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(outside / "secret"),
            "auto_mapping": {"base_model_class": str(outside / "secret")}})):
        (fleet / name).mkdir()
        (fleet / name / "adapter_config.json").write_text(json.dumps(content))
        for file in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "graft.pkl"):
            (fleet / name / file).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (fleet / "remote" / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (fleet / "through").mkdir()
    (fleet / "through" / "graft").symlink_to(outside / "secret")  # where a run folder has its adapter
    (fleet / "deep").mkdir()
    (fleet / "deep" / "up").symlink_to(outside)
    (allowed / "up").symlink_to(outside / "secret")
    return fleet, allowed, outside


def test_nothing_outside_is_opened(places, tmp_path, watched):
    fleet, allowed, outside = places
    names = ["../outside/secret", str(outside / "secret"), "..%2Foutside%2Fsecret", "%2e%2e/outside/secret", "a0/../../outside/secret",
             "deep/up/secret", ".", "..", "", "a0\0", "a0/", "~", "file:///etc/passwd", "http://127.0.0.1:9/x", BOOK,
             "..\\outside\\secret", "a0\n", "ａ0"]
    paths = [*names[:5], "deep/up/secret", "through/graft", str(allowed / "up"), str(allowed / "good" / ".." / ".." / "outside" / "secret"),
             f"{fleet}/../outside/secret", "//etc", "/proc/self/cwd", "/dev/fd/0", str(outside), "a0\0/../..", "pickle", "remote", "deep",
             "~/x", "file:///etc", str(allowed / "good" / "graft.json"), str(tmp_path)]

    async def main():
        app = make_app(fleet, allow_load=True, roots=[allowed])
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
                async def load(name, path, **fields):
                    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})

                wanted = text_of(await complete(client, "a0"))
                for name in names:
                    error_of(await complete(client, name), 404)
                    error_of(await client.post("/tokenize", json={"model": name, "prompt": "x"}), 404)
                    error_of(await client.post("/v1/unload_lora_adapter", json={"lora_name": name}), 404)
                    error_of(await load(name, "a0", load_inplace=True), 400)
                for path in ("/v1/models/..%2foutside%2fsecret", "/v1/models/%2fetc%2fpasswd", "/v1/models/a0%00", "/v1/models/%2e%2e"):
                    assert (await client.get(path)).status_code == 404
                for name in ("through", "deep", "pickle", "remote"):
                    assert error_of(await complete(client, name), 400)["code"] == "adapter_unusable", name
                for path in paths:
                    error_of(await load("n", path), 400)
                    error_of(await load("a0", path, load_inplace=True), 400)
                assert text_of(await complete(client, "a0")) == wanted

                # a folder that was loaded is put out of the way and a link takes its place; a file of it likewise
                assert (await load("n", str(allowed / "good"))).status_code == 200
                assert text_of(await complete(client, "n")) == wanted
                shutil.move(allowed / "good", allowed / "kept")
                (allowed / "good").symlink_to(outside / "secret")
                error_of(await complete(client, "n"), 404)
                (allowed / "good").unlink()
                shutil.copytree(allowed / "kept", allowed / "good")
                (allowed / "good" / "graft.json").unlink()
                (allowed / "good" / "graft.json").symlink_to(outside / "secret" / "graft.json")
                error_of(await complete(client, "n"), 400)

    asyncio.run(main())
    assert any(Path(path).is_relative_to(fleet / "a0") for path in watched)
    assert not [path for path in watched if Path(path).is_relative_to(outside)]
    assert not [path for path in watched if path.endswith((".bin", ".pt", ".pkl")) and Path(path).is_relative_to(tmp_path)]
    assert not (tmp_path / "exploded").exists()


def test_the_audit_sees_what_is_opened(tmp_path, watched):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    watched.clear()
    (tmp_path / "link").read_text()
    list(os.scandir(tmp_path))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert watched[:2] == [str(tmp_path / "file"), str(tmp_path)] and (tmp_path / "exploded").exists()
