"""Which adapters a server offers: an index without reading, one book for several servers, versions and aliases, digests that hold."""

import asyncio
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest

import graftwork
import tiny
from graftwork.errors import ArtifactError, GraftworkError, UsageError
from graftwork.serving.engine import hosts as hosts_module
from graftwork.serving.engine.hosts import Host, Hosts, read_adapter
from graftwork.serving.http.adapters import Catalog
from graftwork.serving.http.errors import UnknownAdapter
from graftwork.serving.registry import BOOK, Book, State
from graftwork.serving.sources import Reference
from test_engine import saved_adapters

SUM = "0" * 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("saved"), tiny.llama()
    saved_adapters(folder, model, 3)
    return folder, model


@pytest.fixture
def fleet(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "fleet")
    return tmp_path / "fleet"


# -- the index -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_ten_thousand_adapters_are_indexed_without_opening_one(saved, tmp_path, monkeypatch):
    model, root = saved[1], tmp_path / "fleet"
    files = [(file.name, str(file)) for file in (saved[0] / "a0").iterdir()]
    for i in range(10_000):
        os.makedirs(root / f"a{i}")
        for name, file in files:
            os.link(file, root / f"a{i}" / name)
    opened, made = [], []
    for module, name in ((os, "open"), (__import__("io"), "open"), (__import__("builtins"), "open")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *a, plain=plain, **k: (opened.append(str(path)), plain(path, *a, **k))[1])
    plain_load = hosts_module.read_tensors
    monkeypatch.setattr(hosts_module, "read_tensors", lambda *a: (made.append(a[0]), plain_load(*a))[1])
    catalog = Catalog(model, root, base="tiny")
    names = catalog.names()
    assert len(names) == 10_000 and not made and not [path for path in opened if "graft." in path]
    catalog.target("a7777")
    assert not [path for path in opened if "graft." in path]
    assert catalog.host(catalog.digest("a7777")).tensors
    read = [path for path in opened if "graft." in path]
    assert made == [root / "a7777"] and {Path(path).parent for path in read} == {root / "a7777"} and catalog.reads == 1


# -- the book ----------------------------------------------------------------------------------------------------------------------------
def test_a_change_is_seen_by_others_and_nothing_is_read_without_one(tmp_path):
    one, two = Book(tmp_path / BOOK), Book(tmp_path / BOOK)
    assert one.read() is one.read() and two.reads == 0
    one.change(lambda state: state.with_adapter("a", "x"))
    assert two.read().adapters == {"a": "x"}
    before, reads = two.read(), two.reads
    assert all(two.read() is before for _ in range(5)) and two.reads == reads
    two.change(lambda state: state.with_adapter("b", Reference("memory://ok/b", SUM)).with_alias("c", "b@1").with_adapter("d", None))
    wanted = {"a": "x", "b": Reference("memory://ok/b", SUM), "d": None}
    assert one.read() == State(wanted, {"c": "b@1"}) == Book(tmp_path / BOOK).read()
    two.change(lambda state: state)
    assert one.read() is one.read() and [f.name for f in tmp_path.iterdir()] == [BOOK]
    with pytest.raises(ZeroDivisionError):
        one.change(lambda state: 1 / 0)
    assert two.read() == State(wanted, {"c": "b@1"})
    (tmp_path / BOOK).unlink()
    assert one.read() == State()


def test_a_change_that_leaves_size_and_inode_is_seen(tmp_path, monkeypatch):
    """Two changes within a tick of the clock, the second back in the first one's inode: only the time can tell them apart."""
    one, two = Book(tmp_path / BOOK), Book(tmp_path / BOOK)
    monkeypatch.setattr("graftwork.serving.registry.time.time_ns", lambda: 10**18)
    one.change(lambda state: state.with_alias("a", "a@1"))
    stamps = {two._stamp()}
    for version in "232123":
        one.change(lambda state, version=version: state.with_alias("a", f"a@{version}"))
        assert two.read().aliases == {"a": f"a@{version}"}
        stamps.add(two._stamp())
    assert len({stamp[1] for stamp in stamps}) == 7


@pytest.mark.parametrize("text", ["", "[]", "{", '{"adapters": []}', '{"adapters": {"../x": "a"}}', '{"adapters": {"a": 1}}', "[" * 5000,
                                  '{"adapters": {"a": {"url": "x", "sha256": "y"}}}', '{"adapters": {}, "aliases": {"a": "../b"}}'])
def test_a_damaged_book_stops_the_start_and_not_the_server(text, tmp_path, caplog):
    book = Book(tmp_path / BOOK)
    book.change(lambda state: state.with_adapter("a", "x"))
    (tmp_path / BOOK).write_text(text)
    assert book.read().adapters == {"a": "x"} == book.read().adapters
    assert len([record for record in caplog.records if "damaged" in record.getMessage()]) == 1
    with pytest.raises(ArtifactError, match="damaged"):
        book.change(lambda state: state.with_adapter("b", "y"))
    with pytest.raises(ArtifactError, match="damaged"):
        Book(tmp_path / BOOK)
    (tmp_path / BOOK).write_text('{"adapters": {"c": "z"}}')
    assert book.read().adapters == {"c": "z"}


@pytest.mark.slow
def test_writers_lose_nothing_and_readers_see_whole_books(tmp_path):
    """Two processes and two threads write 15 names each; every version of the file that a reader sees is a book, and grows."""
    path, ended, sizes, problems = tmp_path / BOOK, threading.Event(), [], []

    def write(name):
        book = Book(path)
        for i in range(15):
            book.change(lambda state, i=i: state.with_adapter(f"{name}{i}", "x"))

    def watch():
        book = Book(path)
        while not ended.is_set():
            try:
                sizes.append(len(book.read().adapters))
                if path.exists():
                    json.loads(path.read_text())
            except Exception as error:
                problems.append(error)
            ended.wait(0.001)

    processes = [multiprocessing.get_context("fork").Process(target=write, args=(name,)) for name in "pq"]
    for process in processes:
        process.start()
    threads = [threading.Thread(target=write, args=(name,)) for name in "st"]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *threads):
        thread.start()
    for writer in (*processes, *threads):
        writer.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ended.set()
    watcher.join()
    assert not problems and sizes == sorted(sizes) and len(set(sizes)) > 2
    assert sorted(Book(path).read().adapters) == sorted(f"{name}{i}" for name in "pqst" for i in range(15))


# -- two servers on one folder -------------------------------------------------------------------------------------------------------------
def test_servers_on_one_folder_see_each_other(fleet, saved):
    one, two = (Catalog(saved[1], fleet, base="tiny") for _ in range(2))
    content = {name: one.digest(name) for name in ("a0", "a1", "a2")}
    assert not one.put("dates@1", fleet / "a0") and not two.put("dates@2", fleet / "a1")
    assert one.names() == two.names() == ["a0", "a1", "a2", "dates@1", "dates@2"]
    assert two.digest("dates@1") == content["a0"] and one.digest("dates@2") == content["a1"]
    assert one.point("dates", "1") is None
    running = two.pin("dates")
    assert two.digest("dates") == content["a0"] and two.alias("dates") == "dates@1" and "dates" in two.names()
    assert two.point("dates", "2") == "dates@1" and one.digest("dates") == content["a1"]
    assert one.point("dates", "1") == "dates@2" and two.digest("dates") == content["a0"]  # rollback
    assert two.digest(running) == content["a0"]

    for name in ("dates@2", "a2"):
        one.remove(name)
        for catalog in (one, two):
            with pytest.raises(UnknownAdapter):
                catalog.target(name)
    with pytest.raises(UsageError, match="points to"):
        two.remove("dates@1")
    assert two.put("a1", fleet / "a0", replace=True) and one.digest("a1") == content["a0"]
    after = ["a0", "a1", "dates", "dates@1"]
    assert one.names() == two.names() == after == Catalog(saved[1], fleet, base="tiny").names()
    one.remove("dates")
    two.remove("dates@1")
    assert one.names() == ["a0", "a1"]
    assert not two.put("a2", fleet / "a2") and one.digest("a2") == content["a2"]


def test_what_names_may_stand_for(fleet, saved):
    catalog = Catalog(saved[1], fleet, base="tiny")
    catalog.put("dates@1", fleet / "a0")
    catalog.point("dates", "1")
    for call, words in [(lambda: catalog.put("dates@1", fleet / "a1"), "already"), (lambda: catalog.put("a0", fleet / "a1"), "already"),
                        (lambda: catalog.put("dates", fleet / "a1", replace=True), "alias"), (lambda: catalog.point("a0", "1"), "adapter"),
                        (lambda: catalog.point("dates", "3"), "no adapter"), (lambda: catalog.point("dates@1", "1"), "no name"),
                        (lambda: catalog.point("tiny", "1"), "no name"), (lambda: catalog.point("dates", "../x"), "no name"),
                        (lambda: catalog.point("dates", ""), "no adapter"), (lambda: catalog.put("tiny", fleet / "a0"), "no name"),
                        (lambda: catalog.put("../x", fleet / "a0"), "no name"), (lambda: catalog.remove("zz"), "no adapter")]:
        with pytest.raises(GraftworkError, match=words):
            call()
    assert catalog.names() == ["a0", "a1", "a2", "dates", "dates@1"]


def test_what_a_server_may_not_read_it_does_not_offer(fleet, saved, tmp_path):
    """The book is shared: a server with fewer folders offers less, and takes nothing from the others."""
    shutil.copytree(fleet / "a0", tmp_path / "other" / "x")
    wide, narrow = Catalog(saved[1], fleet, base="tiny", roots=[tmp_path / "other"]), Catalog(saved[1], fleet, base="tiny")
    wide.put("a1", tmp_path / "other" / "x", replace=True)
    (fleet / "link").symlink_to(tmp_path / "other" / "x")
    narrow.put("b", fleet / "a2")
    wide.book.change(lambda state: state.with_adapter("far", "../other/x").with_adapter("link2", "link"))
    assert wide.names() == ["a0", "a1", "a2", "b", "far", "link2"] and narrow.names() == ["a0", "a2", "b"]
    for name in ("a1", "far", "link2", "link"):
        with pytest.raises(UnknownAdapter):
            narrow.target(name)
    for name in ("far", "a2"):
        wide.put(f"{name}@1", wide.target(name).place)
        wide.book.change(lambda state, name=name: state.with_alias(f"{name}-now", f"{name}@1"))
    assert {"far-now", "far@1", "a2-now"} <= set(wide.names()) and narrow.names() == ["a0", "a2", "a2-now", "a2@1", "b"]
    narrow.remove("b")
    assert "a1" in wide.names() and wide.digest("a1") == wide.digest("a0")


# -- contents ----------------------------------------------------------------------------------------------------------------------------
def swap(folder, other):
    """Other files under the same names, as a new save leaves them."""
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_a_digest_is_of_what_was_read(kind, fleet, saved, monkeypatch):
    """The files are replaced between any two looks at them: what comes is the old content, the new one, or an error; never a mixture."""
    from graftwork.interchange import peft

    model = saved[1]
    old, new, place = fleet / "old", fleet / "new", fleet / "place"
    for seed, folder in ((5, old), (6, new)):
        graft = graftwork.attach(model, "lora", name="x", seed=seed, r=2)
        for parameter in graft.parameters():
            parameter.data.normal_(generator=__import__("torch").Generator().manual_seed(seed))
        graft.save(folder) if kind == "ours" else peft.write_peft(graft, folder)
        graft.detach()
    wanted = {name: read_adapter(folder)[0] for name, folder in (("old", old), ("new", new))}
    assert len(set(wanted.values())) == 2
    contents = {wanted[name]: read_adapter(folder)[1] for name, folder in (("old", old), ("new", new))}
    plain, outcomes = Path.read_bytes, set()
    plain_text = Path.read_text
    for at in range(4):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place)
        looks = []

        def look(self, *more, plain, at=at, looks=looks, **named):
            found = plain(self, *more, **named)
            if place in self.parents:
                looks.append(self)
                if len(looks) == at:
                    swap(place, new)
            return found

        monkeypatch.setattr(Path, "read_bytes", lambda self, plain=plain, look=look: look(self, plain=plain))
        monkeypatch.setattr(Path, "read_text", lambda self, *a, look=look, **k: look(self, *a, plain=plain_text, **k))
        try:
            digest, content = read_adapter(place)
        except ArtifactError:
            outcomes.add("refused")
            continue
        finally:
            monkeypatch.undo()
        wanted_tensors = getattr(contents[digest], "tensors", None) or contents[digest].files.tensors
        tensors = getattr(content, "tensors", None) or content.files.tensors
        assert tensors.keys() == wanted_tensors.keys() and all((tensors[key] == wanted_tensors[key]).all() for key in tensors)
        outcomes.add(digest)
    assert wanted["old"] in outcomes and ("refused" in outcomes or kind == "peft")


def test_a_content_that_was_replaced_is_not_found_again(fleet, saved):
    catalog = Catalog(saved[1], fleet, base="tiny")
    old, others = catalog.pin("a0").removeprefix("="), catalog.pin("a1").removeprefix("=")
    catalog.put("twin", fleet / "a0")
    shutil.copytree(fleet / "a0", fleet / "copy")
    assert catalog.digest("copy") == old
    swap(fleet / "a0", fleet / "a1")
    catalog.hosts.clear()
    assert catalog.host(old).folder == fleet / "copy"  # it lies there too
    assert catalog.digest("a0") == catalog.digest("twin") == others
    swap(fleet / "copy", fleet / "a1")
    catalog.hosts.clear()
    for _ in range(2):
        with pytest.raises(ArtifactError, match="replaced or deleted"):
            catalog.host(old)
    assert catalog.host(others).tensors


def test_host_memory_is_counted_as_it_comes_and_goes():
    import random

    import torch

    draw, hosts, held = random.Random(0), Hosts(1000), []
    for _ in range(3000):
        digest = f"d{draw.randrange(12)}"
        match draw.randrange(5):
            case 0 | 1:
                hold = draw.random() < 0.3
                hosts.put(digest, Host({}, {"t": torch.empty(draw.randrange(1, 400), dtype=torch.uint8)}, Path("x")), hold=hold)
                assert digest in hosts
                held += [digest] if hold else []
            case 2:
                held += [digest] if len(held) < 4 and hosts.hold(digest) else []
            case 3 if held:
                hosts.let_go(held.pop(draw.randrange(len(held))))
            case 4:
                assert (hosts.get(digest) is not None) == (digest in hosts)
                if draw.random() < 0.05:
                    hosts.clear()
        sizes = {each: hosts.get(each).nbytes for each in hosts}
        assert hosts.bytes == sum(sizes.values()) and set(held) <= set(sizes)
        assert hosts.held == sum(sizes[each] for each in set(held))
        assert hosts.bytes <= max(1000, hosts.held + 400)


# -- over HTTP: see test_http.py for the rest ------------------------------------------------------------------------------------------
def http():
    """The helpers of test_http, whose needs are an extra's."""
    pytest.importorskip("fastapi")
    import test_http

    return test_http


@pytest.mark.slow
def test_versions_and_aliases_over_http(fleet, saved, tmp_path):
    h = http()

    async def main():
        keys = h.read_keys(h.write_keys(tmp_path / "keys", {"name": "op", "manage": True}, {"name": "user"},
                                        {"name": "part", "manage": True, "adapters": ["dates", "dates@1"]}))
        op, user, part = ({"authorization": f"Bearer {name}"} for name in ("op", "user", "part"))
        async with h.serving(fleet, keys=keys, allow_load=True) as (client, service):
            client.headers.update(op)
            wanted = {name: h.text_of(await h.complete(client, name)) for name in ("a0", "a1")}
            long = h.text_of(await h.complete(client, "a0", tokens=100, ignore_eos=True))
            for version in "12":
                body = {"lora_name": f"dates@{version}", "lora_path": f"a{int(version) - 1}"}
                assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200

            async def point(version, headers=op, name="dates"):
                return await client.post("/v1/adapters/alias", json={"name": name, "version": version}, headers=headers)

            assert h.error_of(await h.complete(client, "dates"), 404)["code"] == "model_not_found"
            assert (await point("1")).json() == {"id": "dates", "alias_of": "dates@1", "before": None}
            assert h.text_of(await h.complete(client, "dates")) == wanted["a0"] != wanted["a1"]
            writing = asyncio.create_task(h.complete(client, "dates", tokens=100, ignore_eos=True))
            await h.running(service)
            assert (await point("2")).json()["before"] == "dates@1"
            assert h.text_of(await h.complete(client, "dates")) == wanted["a1"]
            assert h.text_of(await writing) == long  # as it began
            assert (await point("1")).json()["before"] == "dates@2"
            assert h.text_of(await h.complete(client, "dates")) == wanted["a0"]
            listed = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
            assert listed["dates"] == listed["dates@1"] | {"id": "dates", "alias_of": "dates@1"} and listed["dates"]["parent"] == "tiny"
            assert listed["dates@1"]["root"] == str(fleet / "a0") and "alias_of" not in listed["dates@1"]
            assert (await client.get("/v1/models/dates")).json() == listed["dates"]

            h.error_of(await point("2", user), 403)
            h.error_of(await point("2", part), 403)  # the version is not its own
            assert (await point("1", part)).status_code == 200
            assert h.error_of(await point("9"), 404)["code"] == "model_not_found"
            for name in ("a0", "tiny", "../x", "dates@1", "", "x" * 300):
                h.error_of(await point("1", name=name), 400)
            h.error_of(await client.post("/v1/adapters/alias", json={"name": "dates", "version": 2}), 400)
            h.error_of(await client.post("/v1/adapters/alias", json={"name": "dates"}), 400)
            unload = await client.post("/v1/unload_lora_adapter", json={"lora_name": "dates@1"})
            assert "points to" in h.error_of(unload, 400)["message"]
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "dates"})).status_code == 200
            h.error_of(await h.complete(client, "dates"), 404)
            assert h.text_of(await h.complete(client, "dates@1")) == wanted["a0"]
            await h.idle(service)
        async with h.serving(fleet) as (client, service):
            h.error_of(await client.post("/v1/adapters/alias", json={"name": "dates", "version": "1"}), 403)
            assert service.catalog.names() == ["a0", "a1", "a2", "dates@1", "dates@2"]
    asyncio.run(main())


@pytest.mark.slow
def test_an_adapter_is_loaded_from_a_url(fleet, saved, monkeypatch, tmp_path):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    from graftwork.serving.sources import Sources

    h = http()
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    for name in ("a1", "cut"):
        for file in (fleet / "a1").iterdir():
            with fsspec.open(f"memory://ok/{name}/{file.name}", "wb") as target:
                target.write(file.read_bytes()[: -9 if name == "cut" and file.suffix == ".safetensors" else None])
    shutil.move(fleet / "a1", tmp_path / "a1")

    async def main():
        async with h.serving(fleet, allow_load=True, sources=Sources(["memory://ok"])) as (client, service):
            async def load(name, path):
                return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

            for path in ("memory://ok/../evil", "memory://okevil/a", "https://ok/a", "memory://ok/a1#sha256=1"):
                assert h.error_of(await load("n", path), 400)["code"] == "invalid_value"
            for path in ("memory://ok/none", "memory://ok/cut", f"memory://ok/a1#sha256={SUM}"):
                assert h.error_of(await load("n", path), 400)["code"] == "adapter_unusable"
            h.error_of(await h.complete(client, "n"), 404)
            assert (await load("n", "memory://ok/a1")).status_code == 200
            found = h.text_of(await h.complete(client, "n"))
            root = (await client.get("/v1/models/n")).json()["root"]
            assert root.startswith("memory://ok/a1#sha256=") and (await load("m", root)).status_code == 200
            await h.idle(service)
        MemoryFileSystem.store.clear()
        async with h.serving(fleet, sources=Sources(["memory://ok"])) as (client, service):  # a restart, the source gone
            shutil.copytree(tmp_path / "a1", fleet / "a1")
            assert h.text_of(await h.complete(client, "n")) == found == h.text_of(await h.complete(client, "a1"))
        async with h.serving(fleet) as (client, service):
            h.error_of(await h.complete(client, "n"), 404)
    asyncio.run(main())


def test_no_more_is_read_ahead_than_host_memory_may_hold(saved):
    pytest.importorskip("fastapi")
    from queue import SimpleQueue

    from graftwork.serving.http.readahead import ReadAhead

    catalog, tasks, there = Catalog(saved[1], saved[0], base="tiny", host_bytes=1), SimpleQueue(), []
    reader = ReadAhead(catalog, tasks.put)

    def want(name, key):
        reader.want(catalog.target(name), key, lambda digest, error: there.append((name, key, error)))

    def work():
        while reader.active:
            tasks.get(timeout=60)()

    want("a0", "first")
    work()
    want("a1", "second"), want("a0", "third")  # there already
    assert there == [("a0", "first", None), ("a0", "third", None)] and not reader.active and reader.waiting == 1
    want("a2", "first")  # it could not run, and give way, without
    work()
    assert there[2:] == [("a2", "first", None)] and not reader.active
    reader.release("third")
    assert not reader.active
    reader.release("first")
    work()
    assert there[3:] == [("a1", "second", None)] and catalog.reads == 3
    assert reader.cancel("second") is False
    reader.release("second")
    assert catalog.hosts.held == 0 and len(catalog.hosts) == 1
    want("a0", "gone")
    assert reader.cancel("gone")
    work()
    assert there[4:] == [] and catalog.hosts.held == 0
    reader.stop()


class Gate:
    """Reads of some adapters wait until they are let through; who read what, in which thread."""

    def __init__(self, monkeypatch, *slow):
        self.slow, self.seen, self.open = set(slow), [], threading.Event()
        plain = hosts_module.read_adapter

        def read(path):
            self.seen.append((path.name, threading.current_thread().name))
            if path.name in self.slow:
                assert self.open.wait(60)
            return plain(path)

        monkeypatch.setattr("graftwork.serving.http.adapters.read_adapter", read)

    async def reached(self, name):
        while name not in {each for each, _ in self.seen}:
            await asyncio.sleep(0.002)


class Door:
    """While it is closed nothing that waits begins to run."""

    def __init__(self, service):
        scheduler, self.closed = service.engine.scheduler, True
        plain = scheduler._admit
        scheduler._admit = lambda *given: None if self.closed else plain(*given)
        service.loop._unblock = lambda: threading.Event().wait(0.001)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


@pytest.mark.slow
def test_who_waits_for_a_slow_disk_waits_alone(fleet, saved, monkeypatch):
    h = http()
    gate = Gate(monkeypatch, "a0")

    async def main():
        async with h.serving(fleet) as (client, service):
            slow = [asyncio.create_task(h.complete(client, "a0")) for _ in range(3)]
            await gate.reached("a0")
            others = {name: h.text_of(await h.complete(client, name)) for name in ("a1", "tiny", "a2")}
            assert not any(task.done() for task in slow) and service.loop.waiting == 3 and len(set(others.values())) == 3
            slow[2].cancel()
            gone = await h.leave(client._transport.app, service, {**h.LONG, "model": "tiny", "stream": True}, when="streaming")
            assert gone
            gate.open.set()
            assert h.text_of(await slow[0]) == h.text_of(await slow[1]) == h.text_of(await h.complete(client, "a0"))
            await h.idle(service)
            assert [name for name, _ in gate.seen] == ["a0", "a1", "a2"]  # one read for all three
            assert service.catalog.hosts.held == 0 and not service.loop.reader.held
    asyncio.run(main())


@pytest.mark.slow
def test_requests_go_by_arrival_whenever_their_adapters_come(fleet, saved, monkeypatch):
    h = http()
    gate = Gate(monkeypatch, "a0")

    async def main():
        async with h.serving(fleet) as (client, service):
            door, waiting = Door(service), service.engine.scheduler.waiting
            tasks = [asyncio.create_task(h.complete(client, "a0"))]
            await gate.reached("a0")
            tasks.append(asyncio.create_task(h.complete(client, "a1")))
            await until(lambda: len(waiting) == 1)
            gate.open.set()
            await until(lambda: len(waiting) == 2)
            assert [request.adapter for request in waiting] == [service.catalog.pin("a0"), service.catalog.pin("a1")]
            door.closed = False
            for task in tasks:
                h.text_of(await task)
    asyncio.run(main())


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_read(fleet, saved, monkeypatch):
    h = http()
    gate = Gate(monkeypatch, "a0")

    async def main():
        app = h.make_app(fleet)
        service = app.state.service
        service.options.__dict__["drain"] = 0.0
        async with app.router.lifespan_context(app):
            async with h.httpx.AsyncClient(transport=h.httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
                waits = asyncio.create_task(h.complete(client, "a0"))
                await gate.reached("a0")
                stop = asyncio.create_task(service.loop.stop(0.0))
                answer = await waits
                assert answer.status_code in (200, 503) and (answer.status_code == 503 or not answer.json()["choices"][0]["text"])
                await stop
        gate.open.set()
    asyncio.run(main())


@pytest.mark.slow
def test_the_engine_reads_nothing_itself(fleet, saved, monkeypatch):
    """Host memory and pool have room for an adapter or two: adapters leave both all the time, and every read is another thread's."""
    h = http()
    gate = Gate(monkeypatch)
    names = ["a0", "a1", "a2", "tiny"]

    async def main():
        async with h.serving(fleet) as (client, service):
            wanted = {name: h.text_of(await h.complete(client, name)) for name in names}
        gate.seen.clear()
        async with h.serving(fleet, pool_bytes=60_000, host_bytes=10_000, limits=h.Limits(chunk=4, optimism=4.0)) as (client, service):
            aside, absent = [], service.engine.absent
            service.engine.absent = lambda request: (aside.append(request), absent(request))
            for turn in range(4):
                asked = [names[(turn * 3 + i * i) % 4] for i in range(10)]
                answers = await asyncio.gather(*(h.complete(client, name) for name in asked))
                assert [h.text_of(answer) for answer in answers] == [wanted[name] for name in asked]
            hosts, memory, waiting, door = service.catalog.hosts, service.engine.memory, service.engine.scheduler.waiting, Door(service)
            aside.clear()
            waits = asyncio.create_task(h.complete(client, "a0"))
            await until(lambda: waiting)

            def forget():  # the adapter of a request that waits leaves both
                memory.clear()
                service.loop.reader.release(waiting[0].id)
                hosts.clear()
                door.closed = False

            await service.loop.call(forget)
            assert h.text_of(await waits) == wanted["a0"] and len(aside) == 1
            await h.idle(service)
            assert hosts.held == 0 and not service.loop.reader.held and len(hosts) == 1
            assert memory.evictions > 2
        readers = {thread for _, thread in gate.seen}
        assert len(gate.seen) > 4 and all(thread.startswith("graftwork-reader") for thread in readers), readers
    asyncio.run(main())


@pytest.mark.slow
def test_the_next_adapters_are_copied_into_free_pages(fleet, saved):
    h = http()

    async def main():
        async with h.serving(fleet) as (client, service):
            memory, door = service.engine.memory, Door(service)
            tasks = [asyncio.create_task(h.complete(client, name)) for name in ("a0", "a1", "a0")]
            await until(lambda: memory.ahead == 2)
            assert len(memory.residents) == 2 and not any(r.users for r in memory.residents.values())
            door.closed = False
            for task in tasks:
                h.text_of(await task)
            assert memory.loads == memory.ahead == 2 and memory.evictions == 0
            await h.idle(service)
    asyncio.run(main())


def test_pages_are_loaded_ahead_only_where_they_are_free(saved):
    """Cached prefixes and idle adapters stay, and so do the pages into which running requests write next."""
    from graftwork.serving.engine import Engine, Request, Sampling

    catalog = Catalog(saved[1], saved[0], base="tiny")
    with Engine(saved[1], tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, adapters=catalog) as engine:
        memory, pool, request = engine.memory, engine.pool, Request("r", [5], "a0", Sampling(max_tokens=4))
        pages = memory.packing(catalog.digest("a0")).pages
        rest = pool.take(pool.free - pages, "others")
        memory.running["x"] = None
        assert not memory.load_ahead(request) and not memory.residents
        memory.running.clear()
        assert memory.load_ahead(request) and not memory.load_ahead(request) and memory.ahead == memory.loads == 1
        assert pool.free == 0 and not memory.load_ahead(Request("s", [5], "a1")) and memory.evictions == 0
        assert not memory.load_ahead(Request("t", [5], None))
        pool.give(rest)
        memory.check()
        memory.clear()
        catalog.hosts.clear()
        memory.there = catalog.hosts.__contains__
        assert memory.absent(request) and not memory.load_ahead(request)  # nothing is read for it
        memory.there = None
        catalog.load = lambda digest, place: 1 / 0 if digest else None
        with pytest.raises(ZeroDivisionError):
            memory.load_ahead(request)
        del catalog.load
        plain, catalog.load = catalog.load, lambda digest, place: (_ for _ in ()).throw(ArtifactError("broken"))
        assert not memory.load_ahead(request) and pool.free == pool.pages
        catalog.load = plain
        assert not memory.load_ahead(request)  # not again before its own request has tried
        assert memory.resident(catalog.digest("a0")) is not None
        del catalog.load
        memory.clear()
        assert memory.load_ahead(request)


@pytest.mark.slow
def test_files_replaced_while_a_request_waits(fleet, saved):
    """It gets what its name stood for when it came, or is told; never the new content under the old digest, nor the old one's prefixes."""
    h = http()
    prompt = h.TEXT * 3

    async def main():
        async with h.serving(fleet) as (client, service):
            wanted = {name: h.text_of(await h.complete(client, name, prompt)) for name in ("a0", "a1")}
        assert wanted["a0"] != wanted["a1"]
        async with h.serving(fleet) as (client, service):
            memory, waiting = service.engine.memory, service.engine.scheduler.waiting
            for pages, held in ((False, True), (True, True), (True, False)):  # what is given up while it waits
                assert h.text_of(await h.complete(client, "a0", prompt)) == wanted["a0"]  # its prefixes are cached now
                door = Door(service)
                waits = asyncio.create_task(h.complete(client, "a0", prompt))
                await until(lambda: waiting)
                request = waiting[0]

                def replace(pages=pages, held=held, request=request, door=door):
                    swap(fleet / "a0", saved[0] / "a1")
                    if pages:
                        memory.clear()
                    if not held:
                        service.loop.reader.release(request.id)
                    service.catalog.hosts.clear()
                    door.closed = False

                await service.loop.call(replace)
                answer = await waits
                if held:
                    assert h.text_of(answer) == wanted["a0"] and (request.cached > 0) != pages
                else:
                    assert "replaced" in h.error_of(answer, 400)["message"]
                caught = []
                admitted, service.engine.scheduler.policy.admitted = service.engine.scheduler.policy.admitted, caught.append
                assert h.text_of(await h.complete(client, "a0", prompt)) == wanted["a1"]
                assert caught[0].cached == 0 or not pages or held
                service.engine.scheduler.policy.admitted = admitted
                swap(fleet / "a0", saved[0] / "a0")
            await h.idle(service)
    asyncio.run(main())
