"""Several adapters on one request: answers, permissions, what is refused, and adapters that are replaced or leave host memory meanwhile."""

import asyncio
import re
import shutil

import pytest

import graftwork
import tiny
from adapter_support import attach
from graftwork.serving.generate import generate
from graftwork.serving.http.adapters import Catalog
from graftwork.serving.http.keys import read_keys
from test_http import CHAT, TEXT, complete, error_of, events, idle, serving, text_of, write_keys

pytestmark = pytest.mark.slow

KINDS = {"lora": "lora", "paca": "paca", "flora": "flora", "prompt": "prompt", "mixlora": "mixlora"}
SUM = [{"name": "lora", "weight": 0.7}, {"name": "paca", "weight": -1.5}]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("parts"), tiny.llama()
    for i, (name, method) in enumerate(KINDS.items()):
        graft = attach(model, method, name=name, seed=i)
        graft.save(folder / name)
        graft.detach()
    graft = attach(model, "lora", name="tokens", trainable_tokens=[5, 6])
    graft.save(folder / "tokens")
    return folder


def together(folder, parts, prompt=TEXT, tokens=8):
    """The answer of a model with these grafts attached, all on every row."""
    model = tiny.llama()
    for i, (name, weight) in enumerate(parts):
        graftwork.attach_saved(model, folder / name, name=f"p{i}").scale(weight)
    return generate(model, tiny.tokenizer(), [prompt], max_new_tokens=tokens)[0]


def test_a_sum_answers_as_its_parts_attached_together(fleet):
    wanted, alone = together(fleet, [("lora", 0.7), ("paca", -1.5)]), together(fleet, [("lora", 1.0)])
    twice = together(fleet, [("lora", -0.5), ("lora", -0.25)])
    chat = together(fleet, [("lora", 0.7), ("paca", -1.5)], prompt=CHAT)
    assert len({wanted.text, alone.text, twice.text, together(fleet, []).text}) == 4

    async def main():
        async with serving(fleet) as (client, service):
            asked = await asyncio.gather(
                complete(client, "tiny", adapters=SUM), complete(client, "lora"), complete(client, "tiny"),
                complete(client, "tiny", adapters=[{"name": "lora", "weight": -0.5}, {"name": "lora", "weight": -0.25}]),
                complete(client, "tiny", adapters=[{"name": "lora"}]),
                complete(client, "tiny", adapters=SUM, stream=True),
                client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 0,
                                                          "adapters": SUM}))
            assert [text_of(a) for a in asked[:5]] == [wanted.text, alone.text, together(fleet, []).text, twice.text, alone.text]
            assert "".join(e["choices"][0]["text"] for e in events(asked[5].text)) == wanted.text
            assert asked[6].json()["choices"][0]["message"]["content"] == chat.text and asked[0].json()["model"] == "tiny"
            text = (await client.get("/metrics")).text
            sums = [float(n) for n in re.findall(r'graftwork_requests_total\{adapter="\(sum\)",reason="\w+"\} (\S+)', text)]
            assert sum(sums) == 5
            await idle(service)

    asyncio.run(main())


@pytest.mark.parametrize("parts, status, words", [
    ([{"name": "lora"}, {"name": "flora"}], 400, "'flora' .* changes the frozen product"),
    ([{"name": "prompt"}], 400, "'prompt' .* virtual tokens"), ([{"name": "mixlora"}, {"name": "lora"}], 400, "'mixlora' .* routes tokens"),
    ([{"name": "tokens"}], 400, "'tokens' .* rows of tokens"), ([{"name": "lora"}, {"name": "nobody"}], 404, "'nobody' does not exist"),
    ([{"name": "../lora"}], 404, "does not exist"), ([{"name": "tiny"}], 400, "is the base"), ([], 400, "at least 1"),
    ([{"name": "lora"}] * 17, 400, "at most 16"), ([{"name": "lora", "weight": 101}], 400, "100"), ([{"weight": 1}], 400, "name"),
    ([{"name": "lora", "weight": "NaN"}], 400, "finite"), ([{"name": "lora", "weight": True}], 400, "a number"), ("lora", 400, "list"),
    ([{"name": "lora", "rank": 3}], 400, "not known")])
def test_what_cannot_be_added_is_refused(fleet, parts, status, words):
    async def main():
        async with serving(fleet) as (client, service):
            for stream in (False, True):
                error = error_of(await complete(client, "tiny", adapters=parts, stream=stream), status)
                assert re.search(words, error["message"]), error
            assert text_of(await complete(client, "lora", tokens=2))  # the server goes on
            await idle(service)

    asyncio.run(main())


def test_a_sum_belongs_to_the_base(fleet):
    async def main():
        async with serving(fleet) as (client, _):
            error = error_of(await complete(client, "lora", adapters=SUM), 400)
            assert error["param"] == "adapters" and "'tiny'" in error["message"]

    asyncio.run(main())


def test_a_key_needs_the_base_and_every_part(fleet, tmp_path):
    keys = read_keys(write_keys(tmp_path / "keys", {"name": "all"}, {"name": "one", "adapters": ["tiny", "lora"]},
                                {"name": "parts", "adapters": ["lora", "paca"]}))

    async def main():
        async with serving(fleet, keys=keys) as (client, _):
            async def ask(who, parts):
                return await client.post("/v1/completions", headers={"authorization": f"Bearer {who}"}, json={
                    "model": "tiny", "prompt": TEXT, "max_tokens": 4, "temperature": 0, "adapters": parts})

            assert text_of(await ask("all", SUM)) and text_of(await ask("one", SUM[:1]))
            assert error_of(await ask("one", SUM), 404)["param"] == "adapters"
            assert error_of(await ask("parts", SUM), 404)["param"] == "model"

    asyncio.run(main())


def test_parts_that_leave_host_memory_are_read_again(fleet, tmp_path):
    """Host memory holds one adapter at a time, so a sum that waits finds its parts gone."""
    wanted = together(fleet, [("lora", 0.7), ("paca", -1.5)])

    async def main():
        async with serving(fleet) as (client, service):
            service.catalog.hosts.limit = 1
            asked = await asyncio.gather(*(complete(client, name, **more) for name, more in
                                           [("tiny", {"adapters": SUM}), ("lora", {}), ("flora", {}), ("tiny", {"adapters": SUM})]))
            assert text_of(asked[0]) == text_of(asked[3]) == wanted.text

            def forget():
                service.engine.memory.clear()
                digest = service.catalog.digest((("lora", 0.7), ("paca", -1.5)))
                return service.catalog.there(digest)

            assert not await service.loop.call(forget)
            assert text_of(await complete(client, "tiny", adapters=SUM)) == wanted.text
            await idle(service)
            assert not service.loop.reader.held and not service.loop.reader.jobs

    asyncio.run(main())


def test_a_replaced_part_makes_another_sum(fleet, tmp_path):
    shutil.copytree(fleet, tmp_path / "copy")

    async def main():
        async with serving(tmp_path / "copy") as (client, service):
            first = text_of(await complete(client, "tiny", adapters=SUM))
            graft = attach(tiny.llama(), "lora", name="lora", seed=9)
            graft.save(tmp_path / "copy" / "lora")
            second = text_of(await complete(client, "tiny", adapters=SUM))
            assert second == together(tmp_path / "copy", [("lora", 0.7), ("paca", -1.5)]).text != first
            shutil.rmtree(tmp_path / "copy" / "paca")
            assert "'paca'" in error_of(await complete(client, "tiny", adapters=SUM), 404)["message"]
            await idle(service)

    asyncio.run(main())


def test_the_catalog_names_a_sum_by_its_parts(fleet):
    catalog = Catalog(tiny.llama(), fleet, base="tiny")
    digest = catalog.digest((("lora", 0.5), ("paca", 2.0)))
    assert catalog._named(digest) == "lora + paca" and catalog.there(digest)
