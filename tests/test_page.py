"""The page at `/` and its data: what it shows is what the engine has, its files are its own, and nobody sees what is not theirs."""

import asyncio
import json
import random
import re
import shutil
import threading
import time
from collections import Counter
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest

import tiny
from graftwork.serving.engine import Engine, Limits
from graftwork.serving.http import status as status_of
from graftwork.serving.http.adapters import Catalog
from graftwork.serving.http.app import ServerOptions, create_app
from graftwork.serving.http.assets import INDEX, read_assets
from graftwork.serving.http.keys import Key, read_keys
from graftwork.serving.http.rate import Rate
from graftwork.serving.http.status import INTERVAL, Held, Loaded, Snapshot, Watch, show, take
from test_engine import saved_adapters
from test_http import TEXT, complete, error_of, events, idle, serving, text_of, write_keys

ASSETS = {name: content.decode() for name, (content, _) in read_assets().items()}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SCRIPTS = {name: text for name, text in ASSETS.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A folder with adapters a0 (LoRA), a1 (PaCA), a2 (FLoRA)."""
    folder = tmp_path_factory.mktemp("fleet")
    saved_adapters(folder, tiny.llama(), 3)
    return folder


# -- files ---------------------------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """tags: [(tag, attributes)]; texts of elements that would be code."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inline, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside in ("script", "style") and data.strip():
            self.inline.append(data)

    def all(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


PAGE = Page(ASSETS[INDEX])


def test_files_are_served_with_their_types_and_a_strict_policy(fleet):
    async def main():
        async with serving(fleet) as (client, _):
            index = await client.get("/")
            assert index.status_code == 200 and index.text == ASSETS[INDEX]
            asked = {"/": index}
            for name in ASSETS:
                asked[name] = await client.get(f"/page/{name}")
                assert asked[name].text == ASSETS[name]
                assert asked[name].headers["content-type"].split(";")[0] == KINDS[name.rpartition(".")[2]]
            for response in asked.values():
                policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
                assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
                assert all(value in ("'self'", "'none'") for value in policy.values())
                assert response.headers["x-content-type-options"] == "nosniff" and response.headers["referrer-policy"] == "no-referrer"
                again = await client.get(response.request.url, headers={"if-none-match": response.headers["etag"]})
                assert again.status_code == 304 and not again.content
            assert (await client.head("/")).status_code == 200
            assert "/" not in (await client.get("/openapi.json")).json()["paths"]
            for trick in ("", "nothing.js", "%2e%2e/app.py", "..%2fapp.py", "%2Fetc%2Fpasswd", "index.html%00", "page/main.js",
                          "MAIN.JS", "%5c..%5capp.py", "__init__.py", "main.js%2f..%2fapp.py", "A" * 5000):
                assert error_of(await client.get(f"/page/{trick}"), 404), trick
            error_of(await client.post("/", json={}), 405)
        async with serving(fleet, page=False) as (client, _):
            error_of(await client.get("/"), 404)
            error_of(await client.get("/page/main.js"), 404)
            assert (await client.get("/v1/status")).status_code == 200
    asyncio.run(main())


@pytest.mark.parametrize("option", ["--page", "--no-page"])
def test_the_command_line_turns_it_off(option, tmp_path, monkeypatch):
    from graftwork.cli.main import main
    from graftwork.serving.http import server

    apps = []
    monkeypatch.setattr(server, "run", lambda app, *rest, **more: apps.append(app))
    monkeypatch.setattr(server, "log_to_stderr", lambda level: None)
    main(["serve", "--model", str(tiny.save(tiny.llama(), tmp_path / "tiny")), "--port", "0", "--pool", "1MiB", "--quiet", option])
    paths = {route.path for route in apps[0].routes}
    assert "/v1/status" in paths and ({"/", "/page/{name}"} <= paths) == (option == "--page") == bool(paths & {"/", "/page/{name}"})


def test_files_refer_to_each_other_only_and_none_is_left_over():
    reached, left = set(), [INDEX]
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached.add(name)
        text = ASSETS[name]
        if name == INDEX:
            found = [each.removeprefix("page/") for each in PAGE.all("src") + PAGE.all("href")]
            assert all(each.startswith("page/") for each in PAGE.all("src") + PAGE.all("href"))
        elif name.endswith(".js"):
            found = [each.removeprefix("./") for each in re.findall(r'(?:from|import)\s*\(?"([^"]+)"', text)]
        else:
            found = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", text)
        assert set(found) <= set(ASSETS), (name, found)
        left += found
        assert set(re.findall(r"\w+://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"\b(eval|innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|new Function)\b", text), name
        assert max(map(len, text.splitlines())) <= 140 and len(text.splitlines()) <= 250
    assert reached == set(ASSETS)


def test_html_has_no_inline_code_and_what_scripts_and_labels_name_is_there():
    assert not PAGE.inline
    assert not [attribute for _, attributes in PAGE.tags for attribute in attributes if attribute == "style" or attribute.startswith("on")]
    ids = PAGE.all("id")
    assert len(ids) == len(set(ids))
    named = {name for text in SCRIPTS.values() for name in re.findall(r'\bfind\("([^"]+)"\)', text)}
    assert named <= set(ids) and named
    for attribute in ("for", "aria-controls", "aria-describedby"):
        assert set(PAGE.all(attribute)) <= set(ids)
    labelled = set(PAGE.all("for"))
    fields = [attributes for tag, attributes in PAGE.tags if tag in ("input", "textarea")]
    inside = {"max_tokens", "temperature", "top_p", "seed"}  # of their labels
    assert all(f.get("type") == "radio" or f["id"] in labelled | inside or "aria-label" in f for f in fields)
    assert all(attributes.get("type") for tag, attributes in PAGE.tags if tag == "button")
    assert ("html", {"lang": "en"}) in PAGE.tags
    styles = "".join(text for name, text in ASSETS.items() if name.endswith(".css"))
    classes = set(re.findall(r"\.([a-z][a-z-]*[a-z])\b(?=[^{}]*\{)", styles))
    used = " ".join([*SCRIPTS.values(), ASSETS[INDEX]])
    assert not [name for name in classes if name.rstrip("-") not in used and not name.startswith(("key-", "slot-"))]


def test_the_package_brings_its_files():
    import tomllib

    root = Path(__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["graftwork"]
    files = list((root / "src" / "graftwork" / "serving" / "http" / "page").iterdir())
    assert {file.name for file in files} == set(ASSETS)
    assert all(any(fnmatch(f"serving/http/page/{file.name}", pattern) for pattern in patterns) for file in files)


# -- numbers -------------------------------------------------------------------------------------------------------------------------
def test_rate_is_of_the_last_seconds():
    now = [100.0]
    rate = Rate(lambda: now[0], window=5.0, slot=0.25)
    assert rate.per_second() == 0.0
    rate.add(3)
    assert rate.per_second() == 3.0  # of a second at least
    for _ in range(80):  # ten a second, for eight seconds
        now[0] += 0.1
        rate.add(1)
    assert rate.total == 83 and rate.per_second() == pytest.approx(10, rel=0.06)
    assert len(rate._slots) <= 21
    now[0] += 2.5
    assert rate.per_second() == pytest.approx(5, rel=0.11)
    now[0] += 10
    assert rate.per_second() == 0.0 and rate.total == 83
    rate.add(4)
    assert rate.per_second() == 4.0


def unrolled(status):
    """The owner of every page."""
    pool = status["pool"]
    pages = [pool["owners"][owner] for owner, length in pool["map"] for _ in range(length)]
    assert len(pages) == pool["pages"] and all(length > 0 for _, length in pool["map"])
    assert all(a[0] != b[0] for a, b in zip(pool["map"], pool["map"][1:])), "neighbors of one owner are one run"
    counted = Counter(id(owner) for owner in pages)
    assert [counted[id(owner)] for owner in pool["owners"]] == [owner["pages"] for owner in pool["owners"]]
    assert pool["used"] + pool["free"] == pool["pages"] == sum(owner["pages"] for owner in pool["owners"])
    return pages


def label(owner):
    return owner["kind"], owner.get("id") or tuple(owner.get("names", ()))


def by_hand(snapshot, key):
    """The owner of every page, one page at a time."""
    found = []
    for page, users in enumerate(snapshot.users):
        adapter = next((a for a in snapshot.adapters if a.start <= page < a.start + a.pages), None)
        holders = [r for r in snapshot.requests if page in r.pages]
        mine = [r for r in holders if key is None or r.tenant == key.name]
        if not users:
            found.append(("free", ()))
        elif adapter is not None:
            names = tuple(n for n in adapter.names if key is None or key.may_use(n))
            found.append(("adapter", names) if names or key is None else ("other", ()))
        elif len(mine) > 1:
            found.append(("shared", ()))
        elif mine:
            found.append(("request", mine[0].id))
        else:
            found.append(("other" if holders else "prefix", ()))
    return found


@pytest.mark.parametrize("key", [None, Key("alice", b"", ("a*", "base")), Key("bob", b"", ("b1",)), Key("carol", b"", ())],
                         ids=["all", "alice", "bob", "carol"])
def test_the_map_is_what_a_look_at_every_page_gives(key):
    draw = random.Random(7)
    for pages in (1, 2, 40, 97):
        users, adapters, requests, at = np.zeros(pages, dtype=np.int32), [], [], 0
        for names in (("a1",), ("b1", "a2"), (), ("c",)):
            size = draw.randint(1, 5)
            if at + size <= pages // 2:
                adapters.append(Loaded(names, at, size, draw.randint(0, 2)))
                users[at: at + size] = 1
            at += size + draw.randint(0, 3)
        rest = [page for page in range(pages) if not users[page]]
        for number in range(draw.randint(0, 6)):
            own = tuple(draw.sample(rest, draw.randint(0, len(rest) // 3)))
            users[list(own)] += 1
            requests.append(Held(f"r{number}", draw.choice(["a1", None, "b1"]), draw.choice(["alice", "bob", "dave"]), own,
                                 draw.random() < 0.8, 5, 5, number, 9))
        users[draw.sample(rest, len(rest) // 3)] += 1  # the prefix cache
        snapshot = Snapshot(users, 16, 1000, tuple(requests), tuple(adapters), 4, 1, 9, 100, 2.5, 3, 2, 10, 20)
        status = show(snapshot, 0.0, "base", key)
        assert [label(owner) for owner in unrolled(status)] == by_hand(snapshot, key)
        assert status["running"] + status["waiting"] == len(requests) and status["running"] == sum(r.running for r in requests)
        assert [r["id"] for r in status["requests"]] == [r.id for r in requests if key is None or r.tenant == key.name]
        assert status["adapters"]["bytes"] == 1000 * sum(a.pages for a in adapters)
        text = json.dumps(status)
        if key is not None:
            hidden = {r.id for r in requests if r.tenant != key.name} | {n for a in adapters for n in a.names if not key.may_use(n)}
            hidden -= {r.name for r in requests if r.tenant == key.name}  # they named it themselves
            assert not [name for name in hidden if f'"{name}"' in text]


class Still:
    """Steps an engine only as often as it is told; what is called between two steps sees one moment for as long as it likes."""

    def __init__(self, engine):
        self.real, self.left, self.work = engine.step, 0, []
        engine.step = self.step
        schedule = engine.scheduler.step

        def scheduled():
            step = schedule()
            self.work.append([(request.id, request.adapter) for request, _ in step.work])
            return step
        engine.scheduler.step = scheduled

    def step(self):
        if self.left == 0:
            time.sleep(0.001)
            return True
        self.left -= 1
        return self.real()

    async def go(self, steps):
        self.left = steps
        while self.left:
            await asyncio.sleep(0.002)


def books(service):
    """The engine's own state, by ways that status.py does not go: what the pool and the memory say of themselves."""
    engine = service.engine
    pool, memory = engine.pool, engine.memory
    memory.check()
    live = {page: request.id for request in engine.scheduler.running for page in request.pages}
    pages = []
    for page in range(pool.pages):
        if pool.owner[page] is None:
            pages.append("free")
        elif pool.fixed[page]:
            pages.append("adapter")
        else:
            pages.append(live.get(page, "prefix"))
    return {"pages": pages, "running": [r.id for r in engine.scheduler.running], "waiting": [r.id for r in engine.scheduler.waiting],
            "steps": engine.steps, "written": sum(len(r.output) for r in engine.requests.values()),
            "users": sorted(r.users for r in memory.residents.values()), "residents": sum(r.pages for r in memory.residents.values())}


def always_new(service):
    """Whoever asks for the status gets a copy that is taken for them."""
    service.watch.clock, service.watch._last = iter(range(10**6)).__next__, None


@pytest.fixture
def patient(monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(status_of, "PATIENCE", 60)


@pytest.mark.slow
def test_status_is_true_at_every_moment(fleet, patient):
    async def main():
        async with serving(fleet, limits=Limits(chunk=4, max_running=3)) as (client, service):
            still = Still(service.engine)
            always_new(service)
            empty = (await client.get("/v1/status")).json()
            assert empty["running"] == empty["waiting"] == empty["pool"]["used"] == 0
            assert empty["pool"]["map"] == [[0, empty["pool"]["pages"]]]
            names = ["a0", "tiny", "a1", "a0"]
            tasks = [asyncio.create_task(complete(client, name, prompt=f"{n} {TEXT}", tokens=20, ignore_eos=True))
                     for n, name in enumerate(names)]
            while len(service.engine.requests) < 4:
                await asyncio.sleep(0.002)
            seen = set()
            for steps in (0, 1, 1, 2, 4, 5, 6, 12, 3):
                await still.go(steps)
                before = None
                while before != (wanted := await service.loop.call(lambda: books(service))):  # adapters are copied ahead meanwhile
                    before, status = wanted, (await client.get("/v1/status")).json()
                pages = [owner.get("id") if owner["kind"] == "request" else owner["kind"] for owner in unrolled(status)]
                assert pages == wanted["pages"]
                listed = status["requests"]
                assert [r["id"] for r in listed if r["state"] == "running"] == wanted["running"]
                assert [r["id"] for r in listed if r["state"] == "waiting"] == wanted["waiting"]
                assert (status["running"], status["waiting"]) == (len(wanted["running"]), len(wanted["waiting"]))
                assert status["steps"] == wanted["steps"]
                ended = [task.result().json()["usage"]["completion_tokens"] for task in tasks if task.done()]
                if len(ended) + len(listed) == 4:
                    assert status["tokens"]["written"] == wanted["written"] + sum(ended)
                assert sorted(a["users"] for a in status["adapters"]["list"]) == wanted["users"]
                assert status["adapters"]["bytes"] == wanted["residents"] * service.engine.pool.page_bytes
                known = {(tuple(owner["names"])) for owner in status["pool"]["owners"] if owner["kind"] == "adapter"}
                assert known == {tuple(a["names"]) for a in status["adapters"]["list"]} <= {("a0",), ("a1",)}
                assert {r["model"] for r in listed} <= set(names)
                seen.add((status["running"], status["waiting"], len(known)))
            assert {(3, 1, 2), (1, 0, 2)} <= seen and (0, 4) in {counts[:2] for counts in seen}
            still.left = 10**9
            await asyncio.gather(*tasks)
            last = (await client.get("/v1/status")).json()
            assert last["requests"] == [] and last["tokens"]["written"] == 80 and last["tokens"]["per_second"] > 0
            assert last["prefixes"]["pages"] == last["pool"]["owners"][1]["pages"] > 0 and last["pool"]["owners"][1]["kind"] == "prefix"
            await idle(service)
    asyncio.run(main())


@pytest.mark.slow
def test_prompts_sent_at_once_share_their_steps(fleet):
    async def main():
        async with serving(fleet) as (client, service):
            still = Still(service.engine)
            still.left = 10**9
            names = ["a0", "tiny", "a1", "a2"]
            answers = await asyncio.gather(*(complete(client, name, tokens=12, ignore_eos=True, stream=True) for name in names))
            assert all(events(answer.text)[-1]["choices"][0]["finish_reason"] == "length" for answer in answers)
            together = [step for step in still.work if len({adapter for _, adapter in step}) == len(names)]
            assert len(together) >= 6  # the last one came a few steps after the first one, and from then on every step is of all
            assert service.engine.steps < 2 * 12
    asyncio.run(main())


@pytest.mark.slow
def test_one_copy_serves_all_who_ask(fleet, caplog):
    async def main():
        async with serving(fleet) as (client, service):
            calls, call, now = [], service.loop.call, [0.0]

            async def counted(function):
                calls.append(1)
                return await call(function)
            service.loop.call = counted
            service.watch.clock, service.watch._last = lambda: now[0], None
            for moment, copies in ((0.0, 1), (0.9 * INTERVAL, 1), (1.1 * INTERVAL, 2), (1.5 * INTERVAL, 2)):
                now[0] = moment
                found = await asyncio.gather(*(client.get("/v1/status") for _ in range(8)))
                assert {response.status_code for response in found} == {200} and len(calls) == copies
            going, step = threading.Event(), service.engine.step
            service.engine.step = lambda: going.wait(20) and step()  # a step that takes its time
            asked = asyncio.create_task(complete(client, "a0"))
            while service.loop.waiting == 0 or service.loop._adding:
                await asyncio.sleep(0.002)
            now[0] = 9.0
            old = (await client.get("/v1/status")).json()
            assert old["age"] == 9.0 - 1.1 * INTERVAL and old["running"] == old["waiting"] == 0
            going.set()
            text_of(await asked)
            now[0] = 10.0
            assert (await client.get("/v1/status")).json()["age"] == 0.0
            service.engine.step = lambda: 1 / 0
            await complete(client, "a0")
            assert error_of(await client.get("/v1/status"), 503)["code"] == "unavailable"
        watch = Watch(service.loop, None)
        with pytest.raises(Exception, match="stop|failed"):
            await watch.snapshot()
    with caplog.at_level("INFO", "graftwork.serve"):
        asyncio.run(main())
    paths = [(r.facts["path"], r.facts["status"]) for r in caplog.records if r.getMessage() == "request"]
    assert ("/v1/completions", 503) in paths and [status for path, status in paths if path == "/v1/status"] == [503]


@pytest.mark.slow
def test_a_key_sees_its_own(fleet, tmp_path, patient):
    keys = read_keys(write_keys(tmp_path / "keys", {"name": "alice", "adapters": ["a0", "tiny"]}, {"name": "bob", "adapters": ["a1"]},
                                {"name": "operator"}))

    async def main():
        async with serving(fleet, keys=keys) as (client, service):
            error_of(await client.get("/v1/status"), 401)
            still = Still(service.engine)
            headers = {name: {"authorization": f"Bearer {name}"} for name in ("alice", "bob", "operator")}
            tasks = [asyncio.create_task(client.post("/v1/completions", headers=headers[who], json={
                "model": model, "prompt": TEXT, "max_tokens": 9, "temperature": 0, "ignore_eos": True}))
                for who, model in (("alice", "a0"), ("alice", "tiny"), ("bob", "a1"))]
            while len(service.engine.requests) < 3:
                await asyncio.sleep(0.002)
            await still.go(3)
            always_new(service)
            found = {who: (await client.get("/v1/status", headers=headers[who])).json() for who in headers}
            kinds = {who: Counter(owner["kind"] for owner in unrolled(status)) for who, status in found.items()}
            assert len({status["pool"]["used"] for status in found.values()}) == len({s["running"] for s in found.values()}) == 1
            assert kinds["alice"]["request"] and kinds["alice"]["adapter"] and kinds["alice"]["other"]
            assert sorted(r["model"] for r in found["alice"]["requests"]) == ["a0", "tiny"]
            assert [r["model"] for r in found["bob"]["requests"]] == ["a1"]
            assert [a["names"] for a in found["bob"]["adapters"]["list"]] == [["a1"]] and found["bob"]["adapters"]["resident"] == 2
            assert found["operator"]["requests"] == [] and {a["names"][0] for a in found["operator"]["adapters"]["list"]} == {"a0", "a1"}
            theirs = {r["id"] for r in found["alice"]["requests"]} | {"a0", "alice", "tiny"}
            assert not [name for name in theirs - {"tiny"} if f'"{name}"' in json.dumps(found["bob"])]
            still.left = 10**9
            await asyncio.gather(*tasks)
    asyncio.run(main())


@pytest.mark.slow
def test_adapters_without_a_name_and_servers_without_adapters(fleet, tmp_path, patient):
    own = shutil.copytree(fleet, tmp_path / "own")  # loading changes the book

    async def main():
        async with serving(own, allow_load=True) as (client, service):
            always_new(service)
            await complete(client, "a0")
            await client.post("/v1/load_lora_adapter", json={"lora_name": "twin", "lora_path": "a0"})
            listed = (await client.get("/v1/status")).json()["adapters"]["list"]
            assert [sorted(each["names"]) for each in listed] == [["a0", "twin"]]
            await client.post("/v1/load_lora_adapter", json={"lora_name": "twin", "lora_path": "a1", "load_inplace": True})
            await client.post("/v1/load_lora_adapter", json={"lora_name": "a0", "lora_path": "a1", "load_inplace": True})
            status = (await client.get("/v1/status")).json()
            assert [sorted(each["names"]) for each in status["adapters"]["list"]] == [["a0", "twin"], []]
            mapped = {tuple(sorted(owner["names"])) for owner in unrolled(status) if owner["kind"] == "adapter"}
            assert mapped == {(), ("a0", "twin")}
        model = tiny.llama()
        engine = Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, prefix_cache=False)
        app = create_app(engine, ServerOptions(model="tiny", drain=1))
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                text_of(await complete(client, "tiny"))
                status = (await client.get("/v1/status")).json()
                assert status["adapters"]["list"] == [] and status["prefixes"]["pages"] == status["pool"]["used"] == 0
                assert (await client.get("/")).status_code == 200
    asyncio.run(main())


@pytest.mark.slow
def test_sums_are_named_by_their_parts(fleet, tmp_path, patient):
    keys = read_keys(write_keys(tmp_path / "keys", {"name": "alice", "adapters": ["a*", "tiny"]}, {"name": "bob", "adapters": ["a0"]}))
    parts = [{"name": "a0", "weight": 0.5}, {"name": "a1", "weight": -2}]

    async def main():
        async with serving(fleet, keys=keys) as (client, service):
            always_new(service)
            still = Still(service.engine)
            asked = asyncio.create_task(client.post("/v1/completions", headers={"authorization": "Bearer alice"}, json={
                "model": "tiny", "adapters": parts, "prompt": TEXT, "max_tokens": 9, "temperature": 0, "ignore_eos": True}))
            while not service.engine.requests:
                await asyncio.sleep(0.002)
            await still.go(3)
            alice, bob = [(await client.get("/v1/status", headers={"authorization": f"Bearer {who}"})).json() for who in ("alice", "bob")]
            assert [r["model"] for r in alice["requests"]] == ["0.5 * a0 + -2 * a1"]
            assert [a["names"] for a in alice["adapters"]["list"]] == [["0.5 * a0 + -2 * a1"]] and bob["adapters"]["list"] == []
            assert {owner["kind"] for owner in unrolled(bob)} == {"free", "other"} and "a1" not in json.dumps(bob)
            still.left = 10**9
            assert text_of(await asked)
    asyncio.run(main())


def test_a_copy_is_independent_of_the_engine(fleet):
    model = tiny.llama()
    app_engine = Engine(model, tiny.tokenizer(), pool_bytes=1 << 20, page_tokens=8, adapters=Catalog(model, fleet, base="tiny"))
    app = create_app(app_engine, ServerOptions(model="tiny"))
    loop = app.state.service.loop
    before = take(loop, None)
    pages = app_engine.pool.take(3, "x")
    assert not before.users.any() and take(loop, None).users.sum() == 3
    app_engine.pool.give(pages)
    app_engine.close()


