"""Adapters from URLs: what may be read, what is taken, and what stays in the cache. Nothing here leaves the machine."""

import hashlib
import os
import shutil
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import tiny
from graftwork.cache import cache_folder
from graftwork.errors import ArtifactError, UsageError
from graftwork.serving.http.adapters import Catalog
from graftwork.serving.sources import Reference, Sources, parse
from test_engine import saved_adapters

SUM = "0" * 64


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty memory:// and an empty cache; the files that were opened at memory://."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    opened, plain = [], MemoryFileSystem._open
    monkeypatch.setattr(MemoryFileSystem, "_open",
                        lambda self, path, mode="rb", **more: (mode == "rb" and opened.append(path), plain(self, path, mode, **more))[1])
    return opened


def put(url, card=b"card", tensors=b"tensors", names=("graft.json", "graft.safetensors")):
    """Two files at a URL; the sum of both as `cat | sha256sum` prints it."""
    for name, content in zip(names, (card, tensors)):
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(content)
    return hashlib.sha256(card + tensors).hexdigest()


# -- which URLs ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, url", [
    ("memory://ok/a", "memory://ok/a"), ("MEMORY://ok//a/", "memory://ok/a"), ("memory://ok/x/../a", "memory://ok/a"),
    ("memory://ok/./a", "memory://ok/a"), ("memory:///ok/a", "memory://ok/a"), ("memory://evil/../ok/a", "memory://ok/a"),
    ("memory://ok/../evil", "memory://evil"), ("memory://../../etc", "memory://etc"), ("file:///ok/../etc/x", "file:///etc/x"),
    ("https://host/a/../../b", "https://b"), (f"s3://b/a#sha256={SUM}", "s3://b/a")])
def test_what_a_url_names(text, url):
    assert parse(text).url == url
    assert parse(text).sha256 == (SUM if "#" in text else None)


@pytest.mark.parametrize("text", ["x/y", "memory:ok", "memory://ok/%2e%2e/evil", "memory://ok/%2E%2e%2fevil", "memory://ok/..\\evil",
                                  "simplecache::memory://ok/a", "memory://ok/a b", "memory://ok/a\0", "https://host/a?x=1",
                                  "https://user:word@host/a", "file://ok/a", "memory://ok/a#sha256=12", "memory://ok/a#md5=1",
                                  f"memory://ok/a#sha256={SUM}#sha256={SUM}"])
def test_what_is_no_url(text):
    with pytest.raises(UsageError, match="no URL of an adapter"):
        parse(text)


@pytest.mark.parametrize("text", ["memory://ok/../evil", "memory://okevil", "memory://okevil/a", "memory://evil/ok/a", "memory://ok",
                                  "memory://ok/", "memory://ok/..", "file:///ok/a", "memory://OK/a", "https://ok/a"])
def test_nothing_outside_of_the_prefixes_is_opened(text, place):
    put("memory://evil"), put("memory://okevil/a")
    sources = Sources(["memory://ok"])
    with pytest.raises(UsageError, match="below"):
        sources.reference(text)
    with pytest.raises(UsageError, match="below"):
        sources.fetch(parse(text))
    assert not place and not sources.reads


def test_a_prefix_whose_driver_is_missing_is_refused_at_the_start():
    with pytest.raises(UsageError, match="nosuch://"):
        Sources(["nosuch://a"])


def test_a_redirect_is_not_followed(monkeypatch):
    """fsspec's HTTP file system hands its options to every request."""
    seen = []
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: seen.append((scheme, options)) or MemoryFileSystem())
    Sources(["https://host/adapters", "memory://ok"])
    assert seen[0] == ("https", {"skip_instance_cache": True, "allow_redirects": False})
    assert "allow_redirects" not in seen[1][1]


def test_over_http_files_come_and_redirects_do_not(tmp_path):
    pytest.importorskip("aiohttp")
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    files = {"/ok/a/graft.json": b"card", "/ok/a/graft.safetensors": b"tensors", "/evil/graft.json": b"card",
             "/evil/graft.safetensors": b"no"}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/ok/moved/"):
                self.send_response(302)
                self.send_header("location", self.path.replace("/ok/moved", "/evil"))
            else:
                self.send_response(200 if self.path in files else 404)
            content = files.get(self.path, b"")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *given):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}/ok"
        sources = Sources([base])
        folder, found = sources.fetch(sources.reference(f"{base}/a"))
        assert (folder / "graft.safetensors").read_bytes() == b"tensors" and found.sha256 == hashlib.sha256(b"cardtensors").hexdigest()
        with pytest.raises(ArtifactError, match="neither"):
            sources.fetch(sources.reference(f"{base}/none"))
        asked.clear()
        try:
            folder, _ = sources.fetch(sources.reference(f"{base}/moved"))
            assert not any(file.read_bytes() for file in folder.iterdir())
        except ArtifactError:
            pass
        assert asked and not [path for path in asked if path.startswith("/evil")]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- what is taken ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [("graft.json", "graft.safetensors"), ("adapter_config.json", "adapter_model.safetensors")])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_two_files_are_taken_and_nothing_else(scheme, names, tmp_path, place):
    base = "memory://ok/a" if scheme == "memory" else f"file://{tmp_path}/ok/a"
    (tmp_path / "ok" / "a").mkdir(parents=True)
    wanted = put(base, names=names)
    put(base, names=("adapter_model.bin", "training_args.bin"))
    place.clear()
    sources = Sources([base.removesuffix("/a")])
    folder, found = sources.fetch(sources.reference(base))
    assert found == Reference(base, wanted) and str(found) == f"{base}#sha256={wanted}"
    assert sorted(f.name for f in folder.iterdir()) == sorted(names)
    assert (folder / names[1]).read_bytes() == b"tensors" and folder == cache_folder("adapters") / wanted
    assert not any(path.endswith(".bin") for path in place)
    before = sources.reads
    assert sources.fetch(found) == (folder, found) and sources.reads == before  # from the cache


def test_the_sum_decides_what_is_taken(place):
    wanted, sources = put("memory://ok/a"), Sources(["memory://ok"])
    with pytest.raises(ArtifactError, match="another adapter now"):
        sources.fetch(Reference("memory://ok/a", SUM))
    assert not list(cache_folder("adapters").glob("[!.]*"))  # nothing of it stays
    _, found = sources.fetch(parse(f"memory://ok/a#sha256={wanted}"))
    MemoryFileSystem.store.clear()  # the source is gone
    assert Sources(["memory://ok"]).fetch(found)[0].name == wanted
    put("memory://ok/a", tensors=b"others")
    shutil.rmtree(cache_folder("adapters") / wanted)
    with pytest.raises(ArtifactError, match="another adapter now"):
        sources.fetch(found)
    assert sources.fetch(Reference("memory://ok/a"))[1].sha256 not in (None, wanted)


def test_what_is_damaged_in_the_cache_is_fetched_again():
    wanted, sources = put("memory://ok/a"), Sources(["memory://ok"])
    folder, found = sources.fetch(Reference("memory://ok/a"))
    (folder / "graft.safetensors").write_bytes(b"tensorz")
    assert sources.fetch(found)[0] == folder and (folder / "graft.safetensors").read_bytes() == b"tensors"
    (folder / "graft.json").unlink()
    assert sources.fetch(found)[0] == folder and (folder / "graft.json").read_bytes() == b"card" and found.sha256 == wanted


def test_what_cannot_be_taken_says_why(monkeypatch):
    sources = Sources(["memory://ok"], largest=100)
    with pytest.raises(ArtifactError, match="neither graft.json nor adapter_config.json"):
        sources.fetch(Reference("memory://ok/none"))
    put("memory://ok/half")
    MemoryFileSystem().rm("/ok/half/graft.safetensors")
    with pytest.raises(ArtifactError, match="no graft.safetensors"):
        sources.fetch(Reference("memory://ok/half"))
    put("memory://ok/large", tensors=b"x" * 97)
    with pytest.raises(ArtifactError, match="larger"):
        sources.fetch(Reference("memory://ok/large"))
    put("memory://ok/fits", tensors=b"x" * 96)
    assert sources.fetch(Reference("memory://ok/fits"))

    def broken(self, path, mode="rb", **more):
        raise ConnectionResetError("the line is dead")

    monkeypatch.setattr(MemoryFileSystem, "_open", broken)
    with pytest.raises(ArtifactError, match="ConnectionResetError: the line is dead"):
        sources.fetch(Reference("memory://ok/fits"))
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(ArtifactError, match="PermissionError"):
        sources.fetch(Reference("memory://ok/fits"))
    assert {f.name for f in cache_folder("adapters").glob("[!.]*")} == {hashlib.sha256(b"card" + b"x" * 96).hexdigest()}


def test_links_on_the_disk_are_not_followed(tmp_path):
    wanted = put(f"file://{tmp_path}/outside", names=("graft.json", "graft.safetensors")) if (tmp_path / "outside").mkdir() is None else ""
    ok = tmp_path / "ok"
    ok.mkdir()
    (ok / "folder").symlink_to(tmp_path / "outside")
    (ok / "file").mkdir()
    for name in ("graft.json", "graft.safetensors"):
        (ok / "file" / name).symlink_to(tmp_path / "outside" / name)
    (ok / "pipe").mkdir()
    os.mkfifo(ok / "pipe" / "graft.json")
    sources = Sources([f"file://{ok}"])
    for name, words in (("folder", "link"), ("file", "link"), ("pipe", "no file")):
        with pytest.raises(ArtifactError, match=words):
            sources.fetch(Reference(f"file://{ok}/{name}"))
    (tmp_path / "alias").symlink_to(tmp_path / "outside" / "..")  # the operator's prefix may be behind one
    assert Sources([f"file://{tmp_path}/alias"]).fetch(Reference(f"file://{tmp_path}/alias/outside"))[1].sha256 == wanted


# -- the cache -------------------------------------------------------------------------------------------------------------------------
def test_what_was_used_last_stays_in_the_cache(place):
    sources = Sources(["memory://ok"], disk_bytes=3500)
    found = [sources.reference(f"memory://ok/a{i}") for i in range(4)]
    for i in range(4):
        put(f"memory://ok/a{i}", tensors=bytes([i]) * 1000)

    def there():
        return {folder.name for folder in cache_folder("adapters").glob("[!.]*")}

    found[:3] = [sources.fetch(each)[1] for each in found[:3]]
    assert there() == {each.sha256 for each in found[:3]}
    for age, each in zip((30, 20, 10), found[:3]):
        then = os.stat(cache_folder("adapters") / each.sha256).st_mtime - age
        os.utime(cache_folder("adapters") / each.sha256, (then, then))
    sources.fetch(found[0])  # used
    found[3] = sources.fetch(found[3])[1]
    assert there() == {found[i].sha256 for i in (0, 2, 3)}
    place.clear()
    sources.fetch(found[1])
    assert place == ["/ok/a1/graft.json", "/ok/a1/graft.safetensors"] and len(there()) == 3


def test_what_a_killed_server_left_goes(place):
    sources = Sources(["memory://ok"])
    put("memory://ok/a")
    import socket

    host = hashlib.sha1(socket.gethostname().encode()).hexdigest()[:6]
    left = cache_folder("adapters") / f".new-0123.{host}-{2**22 + 1}-01234567.tmp"
    left.mkdir()
    (left / "graft.safetensors").write_bytes(b"half")
    sources.fetch(Reference("memory://ok/a"))
    assert not left.exists()


# -- in a catalog ------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("saved"), tiny.llama()
    saved_adapters(folder, model, 2)
    return folder, model


def upload(folder, url):
    return put(url, *((folder / name).read_bytes() for name in ("graft.json", "graft.safetensors")))


def test_without_prefixes_no_url_is_opened(saved, tmp_path, monkeypatch):
    catalog = Catalog(saved[1], tmp_path, base="tiny")
    monkeypatch.setattr(fsspec, "filesystem", None)
    monkeypatch.setattr(fsspec, "open", None)
    with pytest.raises(UsageError, match="reads none"):
        catalog.allowed("memory://ok/a")
    catalog.put("x", Reference("memory://ok/a", SUM))  # as another server with the same book might
    assert catalog.names() == []
    with pytest.raises(UsageError, match="no adapter"):
        catalog.target("x")


def test_an_adapter_from_a_url_is_the_adapter(saved, tmp_path):
    folder, model = saved
    wanted = upload(folder / "a0", "memory://ok/a")
    (tmp_path / "fleet").mkdir()

    def catalog(*prefixes):
        return Catalog(model, tmp_path / "fleet", base="tiny", sources=Sources(prefixes or ["memory://ok"]))

    first = catalog()
    target = first.at("dates", first.allowed("memory://ok/a"))
    assert target.place.sha256 == wanted
    digest = first.open(target)
    assert digest == Catalog(model, folder, base="tiny").digest("a0")
    first.put("dates", target.place)
    assert first.names() == ["dates"] and first.where("dates") == f"memory://ok/a#sha256={wanted}"

    MemoryFileSystem.store.clear()  # the source is gone, the server starts again
    again = catalog()
    assert again.names() == ["dates"] and again.digest("dates") == digest and again.host(digest).tensors
    assert catalog("memory://other").names() == []
    with pytest.raises(UsageError, match="no adapter"):
        catalog("memory://other").target("dates")

    upload(folder / "a1", "memory://ok/a")  # other content at the URL
    shutil.rmtree(cache_folder("adapters"))
    with pytest.raises(ArtifactError, match="another adapter now"):
        catalog().digest("dates")
    assert again.host(digest).tensors  # what is in host memory is what it was
    upload(folder / "a0", "memory://ok/a")
    assert catalog().digest("dates") == digest


def test_a_truncated_file_fails_its_own_adapter(saved, tmp_path):
    folder, model = saved
    card, tensors = ((folder / "a0" / name).read_bytes() for name in ("graft.json", "graft.safetensors"))
    put("memory://ok/cut", card, tensors[:-9])
    catalog = Catalog(model, tmp_path, base="tiny", sources=Sources(["memory://ok"]))
    target = catalog.at("cut", catalog.allowed("memory://ok/cut"))
    with pytest.raises(ArtifactError, match="truncated"):
        catalog.open(target)
    assert catalog.known(target) is None and not len(catalog.hosts)
