"""A real server under more load, and worse clients, than it has room for: no answer is lost or wrong, and it comes back after anything."""

import asyncio
import importlib.util
import os
import random
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("serving_load", Path(__file__).parent.parent / "benchmarks" / "serving_load.py")
serving_load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serving_load)
from crowd import Client, Tally, call, crowd, metrics  # noqa: E402  (the benchmark makes them importable)
from serve_process import Server  # noqa: E402

CLIENTS, SECONDS = 500, float(os.environ.get("GRAFTWORK_LOAD_SECONDS", "30"))
#: fewer open files than there are clients
FILES = 256


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    found = serving_load.Fleet(tmp_path_factory.mktemp("load"), prompts=3)
    for prompt in found.prompts:  # or an answer of the wrong adapter could pass
        answers = [ids[:4] for (_, asked), ids in found.known.items() if asked == prompt and len(ids) >= serving_load.SHORTEST]
        assert len(set(answers)) >= 0.75 * len(answers)
    return found


@pytest.fixture(autouse=True)
def files():
    """Enough open files for the clients."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CLIENTS + 500
    if before[1] not in (resource.RLIM_INFINITY,) and before[1] < wanted:
        pytest.skip(f"this machine allows a process {before[1]} open files, the clients need {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, before[0]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def calm(figures):
    """Nothing runs or waits, and no page is held but by prefixes and adapters that may go at any time; nothing failed."""
    assert figures["graftwork_requests_running"] == figures["graftwork_requests_waiting"] == 0 and figures["graftwork_engine_up"] == 1
    assert figures["graftwork_pool_pages_used"] == figures["graftwork_pool_pages_idle"]
    assert not [name for name in figures if name.startswith("graftwork_http_responses_total") and 'status="5' in name]


def test_five_hundred_clients(fleet, tmp_path):
    tally = Tally()
    with Server(fleet.options(), tmp_path / "log", files=FILES) as server:
        found = asyncio.run(fleet.run(server, clients=CLIENTS, seconds=SECONDS, tally=tally))
        assert server.process.poll() is None
    assert tally.wrong == []
    assert tally.most == CLIENTS and tally.whole and tally.left and tally.busy == 0
    assert set(tally.models) == {"tiny", *serving_load.ADAPTERS, "swap", "comes"}
    assert tally.refused[400, "adapter_unusable"] and found["changes of adapters"] >= 4
    end = found["metrics at end"]
    calm(end)
    assert sum(count for name, count in end.items() if name.startswith("graftwork_requests_total") and "abort" in name) > 0
    assert end['graftwork_requests_total{adapter="broken",reason="error"}'] >= tally.refused[400, "adapter_unusable"]
    assert found["rss at end"] < 1.2 * found["rss at start"] + 50e6


def test_little_memory_a_kill_and_an_orderly_end(fleet, tmp_path):
    models = ["tiny", *serving_load.ADAPTERS, "late", serving_load.BROKEN]

    def asks(draw):
        """`late` was loaded at run time, from spare1."""
        model = draw.choice(models)
        ask = fleet.ask(draw, ["spare1" if model == "late" else model])
        return ask if model != "late" else type(ask)({**ask.body, "model": "late"}, ask.answers)

    async def little(server):
        status, content = await call(server.url, *fleet.load("late", "spare1"))
        assert status == 200, content
        tally = await crowd(server.url, asks, clients=60, seconds=3.0)
        assert tally.wrong == [] and tally.busy and tally.whole and tally.left
        figures = await serving_load.idle(server.url)
        calm(figures)
        assert figures["graftwork_adapter_evictions"] > 0
        # killed in the middle of answers: all that may happen to them is that they are lost
        killed = Tally()
        running = asyncio.create_task(crowd(server.url, asks, clients=16, seconds=600.0, tally=killed))
        while not killed.whole:
            await asyncio.sleep(0.05)
        server.process.kill()
        for _ in range(200):
            if len(killed.wrong) >= 16:
                break
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert killed.wrong and all(": lost, " in text for text in killed.wrong)

    async def again(server):
        tally = await crowd(server.url, asks, clients=16, seconds=1.0)
        assert tally.wrong == [] and tally.whole
        assert (await call(server.url, "/v1/models/late"))[0] == 200
        # SIGTERM: who was let in, waiting or writing, gets the whole answer; nobody new is let in
        last, draw = Tally(), random.Random(3)
        clients = [Client(server.url, last, draw, leaves=False) for _ in range(12)]
        models[:] = ["tiny", *serving_load.ADAPTERS, "late"]
        running = [asyncio.create_task(client.ask(asks(draw))) for client in clients]
        inside = 0
        while inside < len(clients):
            inside, now = last.whole, await metrics(server.url)
            inside += now["graftwork_requests_running"] + now["graftwork_requests_waiting"]
        server.process.send_signal(signal.SIGTERM)
        refused = False
        while not refused and server.process.poll() is None:
            try:
                refused = (await call(server.url, "/health"))[0] == 503
            except (OSError, asyncio.IncompleteReadError):
                refused = True
            await asyncio.sleep(0.01)
        assert refused or server.process.poll() is not None
        assert all(await asyncio.gather(*running))
        assert last.wrong == [] and last.whole == len(clients)

    little_pool = {"pool": "512KiB"}
    with Server(fleet.options("--max-queue", "16", **little_pool), tmp_path / "log") as server:
        port = int(server.url.rsplit(":", 1)[1])
        asyncio.run(little(server))
    with Server(fleet.options("--max-queue", "64", "--drain", "200", port=port, **little_pool), tmp_path / "log2") as server:
        assert server.url.endswith(f":{port}")
        asyncio.run(again(server))
        assert server.process.wait(60) == 0
        assert server.log.read_text().rstrip().endswith("stopped")
