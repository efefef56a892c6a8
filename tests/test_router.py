"""Several replicas behind one address: the choice of a replica as a pure function, and the router before two real servers."""

import asyncio
import collections
import hashlib
import importlib.util
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
import pytest

from graftwork.errors import GraftworkError, UsageError
from graftwork.serving.affinity import choose, ranking
from graftwork.serving.http.app import ServerOptions
from graftwork.serving.http.fleet import Fleet
from graftwork.serving.http.keys import read_keys
from graftwork.serving.http.router import Replica, Router, create_router
from test_http import TEXT, complete, error_of, events, make_app, saved, text_of  # noqa: F401

NAMES = [f"adapter-{n}" for n in range(3000)]


# -- the choice ----------------------------------------------------------------------------------------------------------------
def test_only_the_adapters_of_a_lost_replica_move():
    before = {name: ranking(name, range(5))[0] for name in NAMES}
    after = {name: ranking(name, [0, 1, 3, 4])[0] for name in NAMES}
    moved = {name for name in NAMES if before[name] != after[name]}
    assert moved == {name for name in NAMES if before[name] == 2}
    assert {after[name] for name in moved} == {0, 1, 3, 4}, "they spread over those that are left"
    assert all(after[name] == ranking(name, range(5))[1] for name in moved)
    assert {name: ranking(name, [4, 3, 2, 1, 0])[0] for name in NAMES} == before, "the order in which replicas are named says nothing"


def test_adapters_spread_evenly():
    for replicas in (2, 5, 16):
        counts = collections.Counter(ranking(name, range(replicas))[0] for name in NAMES)
        mean = len(NAMES) / replicas
        spread = (mean * (1 - 1 / replicas)) ** 0.5  # of a fair draw
        assert set(counts) == set(range(replicas)) and all(abs(count - mean) < 4 * spread for count in counts.values())


def test_a_full_favorite_sends_the_rest_to_the_least_loaded():
    favorite, second, third = ranking("a", range(3))
    assert choose("a", {0: 0, 1: 0, 2: 0}, 4) == (favorite, "affinity")
    assert choose("a", {favorite: 3, second: 0, third: 0}, 4) == (favorite, "affinity"), "it has room"
    assert choose("a", {favorite: 4, second: 2, third: 1}, 4) == (third, "overflow")
    assert choose("a", {favorite: 4, second: 2, third: 2}, 4) == (second, "overflow"), "equals: the next best by score"
    assert choose("a", {favorite: 9, second: 9, third: 9}, 4) == (favorite, "affinity"), "nobody has less to do"
    assert choose("a", {second: 7, third: 0}, 4) == (third, "overflow") and choose("a", {third: 7}, 4) == (third, "affinity")
    assert choose(None, {0: 3, 1: 2, 2: 2}, 4) == (1, "least")


# -- the router ----------------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def routed(folder, *, keys=None, full=64, replica_keys=None, max_body=4 << 20, **options):
    """A client of a router, the router, and the two servers behind it."""
    apps = [make_app(folder, keys=replica_keys, **options) for _ in range(2)]
    replicas = {n: Replica(n, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica", timeout=60))
                for n, app in enumerate(apps)}

    @asynccontextmanager
    async def nothing(app):
        yield

    router = Router(replicas, ServerOptions(model="tiny", max_body=max_body), full=full, keys=keys)
    async with apps[0].router.lifespan_context(apps[0]), apps[1].router.lifespan_context(apps[1]):
        transport = httpx.ASGITransport(create_router(router, nothing))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield client, router, [app.state.service for app in apps]
        assert not any(replica.open for replica in replicas.values())


class Dead(httpx.AsyncBaseTransport):
    """A replica that ends: before it takes a request (ConnectError) or after (ReadError), or in the middle of its answer."""

    def __init__(self, error=None, parts=()):
        self.error, self.parts, self.seen = error, parts, []

    async def handle_async_request(self, request):
        self.seen.append(request)
        if self.error is not None:
            raise self.error("gone")

        class Broken(httpx.AsyncByteStream):
            async def __aiter__(this):
                for part in self.parts:
                    yield part
                raise httpx.ReadError("gone")

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Broken())


def served(service):
    """{adapter: requests that this server ended}."""
    found = collections.Counter()
    for family in service.metrics.requests.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                found[sample.labels["adapter"]] += int(sample.value)
    return dict(found)


@pytest.mark.slow
def test_answers_come_from_the_adapters_replica(saved):  # noqa: F811
    folder, answer = saved
    names = ["a0", "a1", "a2"]

    async def main():
        async with routed(folder) as (client, router, services):
            for streamed in (False, True):
                for name in names * 2:
                    got = await complete(client, name, stream=streamed, tokens=4)
                    assert got.headers["x-graftwork-replica"] == str(ranking(name, range(2))[0]) and got.headers["x-request-id"]
                    assert len(got.headers.get_list("x-request-id")) == 1
                    text = "".join(c["choices"][0]["text"] for c in events(got.text)) if streamed else text_of(got)
                    assert text == answer(name, TEXT, 4).text
            assert text_of(await complete(client, "tiny", tokens=4)) == answer("tiny", TEXT, 4).text
            for number, service in enumerate(services):
                assert {n for n in served(service) if n != "tiny"} == {n for n in names if ranking(n, range(2))[0] == number}
            assert all(sum(served(s).get(name, 0) for s in services) == 4 for name in names)
            listed = await client.get("/v1/models")
            assert [m["id"] for m in listed.json()["data"]] == ["tiny", *names] and listed.headers["x-graftwork-replica"] == "0"
            missing = await client.get("/v1/models/zz?x=1")
            assert error_of(missing, 404)["code"] == "model_not_found"
            asked = await client.post("/v1/completions", content=b"{", headers={"x-request-id": "mine"})
            assert error_of(asked, 400)["code"] == "invalid_request" and asked.headers["x-request-id"] == "mine"
            text = (await client.get("/metrics")).text
            for number in range(2):
                assert f'graftwork_engine_up{{replica="{number}"}} 1.0' in text
                assert f'graftwork_replica_requests_open{{replica="{number}"}} 0.0' in text
            favorite = ranking("a0", range(2))[0]
            assert f'graftwork_requests_total{{adapter="a0",reason="length",replica="{favorite}"}} 4.0' in text
            assert text.count("# TYPE graftwork_requests_total counter") == 1
            assert (await client.get("/ready")).json() == {"status": "ready"}
            assert (await client.get("/health")).json()["replicas"] == {"0": "ok", "1": "ok"}
    asyncio.run(main())


@pytest.mark.slow
def test_limits_are_those_of_all_replicas_together(saved, tmp_path):  # noqa: F811
    folder, answer = saved
    rows = [{"name": "alice", "sha256": hashlib.sha256(b"secret").hexdigest(), "adapters": ["a0", "a1"], "requests_per_minute": 3}]
    (tmp_path / "keys").write_text("\n".join(json.dumps(row) for row in rows))
    keys, behind = read_keys(tmp_path / "keys"), read_keys(tmp_path / "keys")
    behind.keys[0].requests_per_minute = None
    assert ranking("a0", range(2)) != ranking("a1", range(2)), "the two go to different replicas"

    async def main():
        async with routed(folder, keys=keys, replica_keys=behind, max_body=2000) as (client, router, services):
            assert error_of(await complete(client, "a0"), 401)["code"] == "invalid_api_key"
            client.headers["authorization"] = "Bearer secret"
            assert text_of(await complete(client, "a0", tokens=2)) == answer("a0", TEXT, 2).text
            assert text_of(await complete(client, "a1", tokens=2)) == answer("a1", TEXT, 2).text
            assert error_of(await complete(client, "a2"), 404)["code"] == "model_not_found"
            assert error_of(await complete(client, "a0", "x" * 2000), 413)["code"] == "request_too_large"
            limited = await complete(client, "a1", tokens=2)
            assert error_of(limited, 429)["code"] == "rate_limit_exceeded" and int(limited.headers["retry-after"]) > 0
            assert (await client.get("/v1/models")).status_code == 200, "reading is not counted"
    asyncio.run(main())


@pytest.mark.slow
def test_one_replica_can_be_looked_at(saved):  # noqa: F811
    async def main():
        async with routed(saved[0]) as (client, router, services):
            for path, number in (("/v1/status", "0"), ("/v1/status?replica=0", "0"), ("/v1/status?replica=1", "1"), ("/?replica=1", "1")):
                answer = await client.get(path)
                assert answer.status_code == 200 and answer.headers["x-graftwork-replica"] == number, path
            assert "replicas: 0, 1" in error_of(await client.get("/v1/status?replica=2"), 404)["message"]
            router.replicas[1].client = None
            gone = await client.get("/v1/status?replica=1")
            assert "replica 1" in error_of(gone, 503)["message"] and gone.headers["retry-after"]
            assert (await client.get("/v1/status")).status_code == 200
    asyncio.run(main())


@pytest.mark.slow
def test_a_replica_that_ends_is_passed_over(saved):  # noqa: F811
    folder, answer = saved
    favorite = ranking("a0", range(2))[0]

    async def main():
        async with routed(folder, allow_load=True) as (client, router, services):
            alive = router.replicas[favorite].client
            for error in (httpx.ConnectError, httpx.ReadError):
                dead = Dead(error)
                router.replicas[favorite].client = httpx.AsyncClient(transport=dead, base_url="http://replica")
                got = await complete(client, "a0", tokens=4)
                assert len(dead.seen) == 1 and got.headers["x-graftwork-replica"] == str(1 - favorite)
                assert text_of(got) == answer("a0", TEXT, 4).text
                # a change that may have been made is not made again
                change = await client.post("/v1/unload_lora_adapter", json={"lora_name": "a0"})
                if error is httpx.ReadError:
                    assert error_of(change, 503)["code"] == "unavailable"
                else:
                    assert change.status_code == 200
                    assert (await client.post("/v1/load_lora_adapter", json={"lora_name": "a0", "lora_path": "a0"})).status_code == 200
            broken = Dead(parts=[b'data: {"choices": []}\n\n'])
            router.replicas[favorite].client = httpx.AsyncClient(transport=broken, base_url="http://replica")
            chunks = events((await complete(client, "a0", stream=True)).text)
            assert chunks[0] == {"choices": []} and chunks[1]["error"]["code"] == "unavailable"
            router.replicas[favorite].client = None
            assert text_of(await complete(client, "a0", tokens=4)) == answer("a0", TEXT, 4).text
            assert (await client.get("/health")).json()["replicas"][str(favorite)] == "starting"
            other, router.replicas[1 - favorite].client = router.replicas[1 - favorite].client, None
            gone = await complete(client, "a0")
            assert error_of(gone, 503)["code"] == "unavailable" and gone.headers["retry-after"]
            assert (await client.get("/health")).status_code == (await client.get("/ready")).status_code == 503
            router.replicas[1 - favorite].client, router.replicas[favorite].client = other, alive
            assert 'why="again"' in (await client.get("/metrics")).text
    asyncio.run(main())


@pytest.mark.slow
def test_a_full_batch_overflows(saved):  # noqa: F811
    folder, answer = saved

    async def main():
        async with routed(folder, full=2) as (client, router, services):
            got = await asyncio.gather(*(complete(client, "a0", tokens=4) for _ in range(6)))
            assert {text_of(each) for each in got} == {answer("a0", TEXT, 4).text}
            counts = [served(service)["a0"] for service in services]
            assert sum(counts) == 6 and min(counts) >= 2, counts
            assert router.metrics.requests.labels(str(ranking("a0", range(2))[1]), "overflow")._value.get() == min(counts)
    asyncio.run(main())


@pytest.mark.slow
def test_a_client_that_goes_is_told_to_the_replica(saved):  # noqa: F811
    folder, _ = saved

    async def main():
        async with routed(folder) as (client, router, services):
            app = create_router(router, None)
            for stream in (False, True):
                body = json.dumps({"model": "a0", "prompt": TEXT, "max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()
                inbox = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

                async def receive(inbox=inbox):
                    if len(inbox) == 1:  # the second message comes when the engine is at work
                        while not any(service.engine.scheduler.running for service in services):
                            await asyncio.sleep(0.002)
                    return inbox.pop(0) if inbox else await asyncio.Event().wait()

                async def send(message):
                    pass

                scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
                         "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": ""}
                await app(scope, receive, send)
                assert not any(replica.open for replica in router.replicas.values())
                while any(service.loop.open for service in services):
                    await asyncio.sleep(0.002)
            assert sum(family.count(b'reason="abort"') for family in (service.metrics.text() for service in services))
    asyncio.run(main())


# -- the processes, with a stand-in for Ray: tests/extras/test_ray.py has the real one -----------------------------------------------
class RayError(Exception):
    cause = None


@pytest.mark.parametrize("error, cause, words", [
    (RayError("task"), UsageError("there is no model 'nowhere'", remedy="name one"), "there is no model 'nowhere'"),
    (RayError("task"), KeyError("odd"), "KeyError: 'odd'"), (RayError("the actor died"), None, "RayError: the actor died"),
    (None, None, "ended before it answered")])
def test_a_replica_that_cannot_start_says_why(error, cause, words):
    killed = []

    def get(ref):
        if ref != "ended":
            return ref
        if error is not None:
            error.cause = cause
            raise error

    actor = SimpleNamespace(pid=SimpleNamespace(remote=lambda folder: 1), run=SimpleNamespace(remote=lambda command, options: "ended"))
    fleet = Fleet(2, print, {}, drain=1)
    fleet._process = SimpleNamespace(remote=lambda: actor)
    fleet.ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RayError), get=get, kill=killed.append,
                                wait=lambda refs, timeout: (refs, []))
    with pytest.raises(GraftworkError) as raised:
        fleet._launch(fleet.replicas[0])
    assert words in raised.value.message and raised.value.remedy and killed == [actor] and fleet.replicas[0].starts == 1
    assert (raised.value is cause) == isinstance(cause, GraftworkError)


# -- the verb ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, words", [(["--replicas", "2"], "graftwork[ray]"), (["--replicas", "0"], "--replicas")])
def test_wrong_numbers_of_replicas(options, words, monkeypatch, capsys):
    from graftwork.cli.main import main

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "nowhere", *options])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and words in err and "remedy" in err
