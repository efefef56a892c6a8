"""The server: what it answers is what the engine alone answers, and everything else is an error with a shape that clients know."""

import asyncio
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
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest

import graftwork
import tiny
from graftwork.errors import DataError
from graftwork.serving.engine import Engine, Limits
from graftwork.serving.generate import encode_prompt, generate
from graftwork.serving.http.adapters import BOOK, Catalog
from graftwork.serving.http.app import ServerOptions, create_app
from graftwork.serving.http.keys import read_keys
from test_engine import saved_adapters

pytestmark = pytest.mark.slow  # test_engine.py stands for the engine in make test-fast

TEXT = "the user and one more of these"
CHAT = [{"role": "user", "content": "hi"}]
LONG = {"prompt": TEXT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with adapters a0 (LoRA), a1 (PaCA), a2 (FLoRA), and answer(name, prompt, tokens) of each alone, without the engine."""
    folder, model, known = tmp_path_factory.mktemp("fleet"), tiny.llama(), {}
    saved_adapters(folder, model, 3)

    def answer(name, prompt, tokens=8):
        key = (name, str(prompt), tokens)
        if key not in known:
            graft = None if name == "tiny" else graftwork.attach_saved(model, folder / name, name="one")
            known[key] = generate(model, tiny.tokenizer(), [prompt], adapters=["one" if graft else None], max_new_tokens=tokens)[0]
            if graft:
                graft.detach()
        return known[key]

    return folder, answer


@pytest.fixture
def fleet(saved, tmp_path):
    """A copy of the folder that a test may change."""
    shutil.copytree(saved[0], tmp_path / "fleet")
    return tmp_path / "fleet"


def make_app(folder, *, keys=None, roots=(), pool_bytes=1 << 20, limits=None, sources=None, host_bytes=1 << 30, **options):
    model = tiny.llama()
    catalog = Catalog(model, folder, base="tiny", roots=roots, sources=sources, host_bytes=host_bytes)
    engine = Engine(model, tiny.tokenizer(), pool_bytes=pool_bytes, page_tokens=8, adapters=catalog, limits=limits or Limits(chunk=16))
    return create_app(engine, ServerOptions(model="tiny", drain=5, **options), catalog=catalog, keys=keys)


@asynccontextmanager
async def serving(folder, **options):
    app = make_app(folder, **options)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            yield client, app.state.service
    assert not app.state.service.loop._thread.is_alive()


async def complete(client, model, prompt=TEXT, tokens=8, **fields):
    return await client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **fields})


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def error_of(response, status):
    assert response.status_code == status, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


def events(text):
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def idle(service):
    """Wait for the end of all requests; nothing may be held but resident adapters."""
    while service.loop.open:
        await asyncio.sleep(0.01)

    def look():
        engine = service.engine
        engine.memory.check()
        engine.memory.prefixes.clear()
        residents = engine.memory.residents.values()
        return engine.pool.used - sum(r.pages for r in residents), [r.users for r in residents]

    pages, users = await service.loop.call(look)
    assert pages == 0 and not any(users)


async def running(service):
    while not service.engine.scheduler.running:
        await asyncio.sleep(0.002)


# -- answers -------------------------------------------------------------------------------------------------------------------------
def test_answers_equal_each_adapter_alone(saved):
    folder, answer = saved
    names = ["a0", "tiny", "a1", "a2", "a0"]

    async def main():
        async with serving(folder) as (client, service):
            plain = await asyncio.gather(*(complete(client, name) for name in names))
            streams = await asyncio.gather(*(complete(client, name, stream=True, stream_options={"include_usage": True})
                                             for name in names))
            chats = await asyncio.gather(*(client.post("/v1/chat/completions", json={
                "model": name, "messages": CHAT, "max_completion_tokens": 8, "temperature": 0, "stream": streamed})
                for name in names for streamed in (False, True)))
            for name, one, stream in zip(names, plain, streams):
                wanted = answer(name, TEXT)
                body = one.json()
                assert text_of(one) == wanted.text and body["choices"][0]["finish_reason"] == wanted.finish_reason
                assert body["model"] == name and body["object"] == "text_completion"
                prompt = len(encode_prompt(tiny.tokenizer(), TEXT))
                usage = {"prompt_tokens": prompt, "completion_tokens": wanted.tokens, "total_tokens": prompt + wanted.tokens}
                assert body["usage"].items() >= usage.items()
                chunks = events(stream.text)
                assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == wanted.text
                assert chunks[-1]["choices"] == [] and chunks[-1]["usage"].items() >= usage.items() and chunks[0]["usage"] is None
            for i, name in enumerate(names):
                wanted = answer(name, CHAT)
                whole, chunks = chats[2 * i].json(), events(chats[2 * i + 1].text)
                assert whole["choices"][0]["message"]["content"] == wanted.text and whole["object"] == "chat.completion"
                assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
                assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == wanted.text
                assert chunks[-1]["choices"][0]["finish_reason"] == wanted.finish_reason
            ids = encode_prompt(tiny.tokenizer(), TEXT)
            several = (await complete(client, "a1", [TEXT, "x"], n=2)).json()
            assert [c["text"] for c in several["choices"]] == [answer("a1", p).text for p in (TEXT, TEXT, "x", "x")]
            assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
            assert several["usage"]["prompt_tokens"] == len(ids) + 1
            assert text_of(await complete(client, "a0", ids)) == answer("a0", TEXT).text
            assert text_of(await complete(client, "a0", [ids])) == answer("a0", TEXT).text
            await idle(service)
    asyncio.run(main())


def test_fields_change_the_answer(saved):
    folder, answer = saved
    wanted = answer("a0", TEXT)

    async def main():
        async with serving(folder) as (client, service):
            async def text(**fields):
                return text_of(await complete(client, "a0", **fields))

            stop = wanted.text[3:5]
            assert await text(stop=stop) == await text(stop=["never to be seen", stop]) == wanted.text[: wanted.text.index(stop)]
            cut = wanted.ids.index(wanted.ids[2])
            assert await text(stop_token_ids=[wanted.ids[2]]) == tiny.tokenizer().decode(wanted.ids[:cut])
            letter = tiny.tokenizer().decode([40])
            assert await text(logit_bias={"40": 100}) == 8 * letter
            assert await text(tokens=2) != wanted.text
            warm = dict(temperature=1.5, tokens=24, ignore_eos=True)
            drawn = await text(seed=3, **warm)
            assert drawn == await text(seed=3, **warm) != await text(seed=4, **warm)
            assert drawn != await text(seed=3, top_k=2, **warm)
            assert await text(seed=3, **{**warm, "top_k": 1}) == await text(tokens=24, ignore_eos=True) == \
                await text(seed=3, top_p=1e-6, **warm) == await text(seed=3, min_p=1.0, **warm)
            assert len({await text(tokens=24, **each) for each in (
                {}, {"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0})}) > 2
            ended = (await complete(client, "a0", stop_token_ids=list(wanted.ids), min_tokens=5, tokens=24)).json()
            assert ended["usage"]["completion_tokens"] >= 6
            two = (await complete(client, "a0", n=2, seed=5, **{"temperature": 1.5})).json()["choices"]
            assert two[0]["text"] != two[1]["text"]

            choice = (await complete(client, "a0", logprobs=2)).json()["choices"][0]["logprobs"]
            assert len(choice["tokens"]) == len(choice["token_logprobs"]) == wanted.tokens
            assert all(len(top) == 2 and max(top.values()) == value for top, value in zip(choice["top_logprobs"], choice["token_logprobs"]))
            assert choice["text_offset"][:2] == [0, len(choice["tokens"][0])]
            body = {"model": "a0", "messages": CHAT, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 3}
            content = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
            assert all(len(one["top_logprobs"]) == 3 and one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content)
            streamed = events((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
            parts = [one for c in streamed for one in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]
            assert [one["token"] for one in parts] == [one["token"] for one in content]
    asyncio.run(main())


def test_answers_follow_a_grammar(saved):
    pytest.importorskip("llguidance")

    async def main():
        async with serving(saved[0]) as (client, service):
            blanks = {str(i): -100 for i in tiny.tokenizer().convert_tokens_to_ids(["Ġ", "Ċ"])}  # JSON allows any number of them

            async def text(**fields):
                return text_of(await complete(client, "a1", tokens=60, logit_bias=blanks, **fields))

            schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"], "additionalProperties": False}
            assert re.fullmatch("(the|note)(x|one){2}", await text(guided_regex="(the|note)(x|one){2}"))
            assert await text(guided_grammar='start: "note" "x"') == "notex"
            for fields in ({"guided_json": schema}, {"guided_json": json.dumps(schema)},
                           {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}}):
                assert json.loads(await text(**fields))["a"] in ("x", "yy")
            begun = await text(response_format={"type": "json_object"})
            assert begun.lstrip().startswith("{")
            assert "regex" in error_of(await complete(client, "a1", guided_regex="("), 400)["message"]
            assert text_of(await complete(client, "a1")) == saved[1]("a1", TEXT).text
    asyncio.run(main())


def test_tokens(saved):
    async def main():
        async with serving(saved[0]) as (client, _):
            ids = encode_prompt(tiny.tokenizer(), TEXT)
            found = (await client.post("/tokenize", json={"model": "a0", "prompt": TEXT})).json()
            assert found == {"tokens": ids, "count": len(ids), "max_model_len": 256}
            assert (await client.post("/tokenize", json={"messages": CHAT})).json()["tokens"] == encode_prompt(tiny.tokenizer(), CHAT)
            assert (await client.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False})).json()["tokens"] == \
                tiny.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
            assert TEXT in (await client.post("/detokenize", json={"tokens": ids})).json()["prompt"]
            error_of(await client.post("/detokenize", json={"tokens": [5000]}), 400)
            assert "/v1/chat/completions" in (await client.get("/openapi.json")).json()["paths"]
            error_of(await client.post("/tokenize", json={"prompt": "x", "messages": CHAT}), 400)
    asyncio.run(main())


# -- errors --------------------------------------------------------------------------------------------------------------------------
def test_wrong_requests_are_refused_by_name(saved):
    wrong = [({"foo": 1}, "foo"), ({"tools": [{}]}, "tools"), ({"best_of": 4}, "best_of"), ({"echo": True}, "echo"),
             ({"suffix": "x"}, "suffix"), ({"temperature": -1}, "temperature"), ({"temperature": "warm"}, "temperature"),
             ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"n": True}, "n"), ({"max_tokens": 0}, "max_tokens"),
             ({"logit_bias": {"9999": 1}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
             ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop": ""}, "stop"), ({"logprobs": 99}, "logprobs"),
             ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [300]}, "prompt"),
             ({"prompt": {"a": 1}}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ["x"] * 65}, "prompts"),
             ({"min_tokens": 20}, "min_tokens"), ({"stream_options": {"include_usage": True}}, "stream_options"),
             ({"response_format": {"type": "xml"}}, "response_format"), ({"response_format": {"type": "json_schema"}}, "json_schema"),
             ({"guided_regex": "a", "guided_grammar": "b"}, "exclude"), ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
             ({"max_tokens": 10**6, "prompt": "x" * 100}, None), ({"prompt": "x " * 300}, "prompt")]
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "service_tier": "auto", "best_of": 1,
                "echo": False, "suffix": None, "top_k": -1, "n": None}

    async def main():
        async with serving(saved[0], max_body=20_000, max_queue=8) as (client, service):
            assert text_of(await complete(client, "a0", **harmless)) == saved[1]("a0", TEXT).text
            for fields, word in wrong:
                response = await client.post("/v1/completions", json={"model": "a0", "prompt": TEXT, "max_tokens": 8, **fields})
                if word is None:  # more than the context holds ends at the context
                    assert response.status_code == 200, response.text
                    continue
                assert response.status_code == 400, fields
                error = error_of(response, 400)
                assert word in error["message"] or word == error["param"], (fields, error)
            for chat, word in [({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
                               ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "role"),
                               ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
                               ({"top_logprobs": 3}, "top_logprobs"), ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
                               ({"reasoning_effort": "high"}, "reasoning_effort"), ({"messages": [{**CHAT[0], "foo": 1}]}, "foo")]:
                error = error_of(await client.post("/v1/chat/completions", json={"model": "a0", "messages": CHAT, **chat}), 400)
                assert word in error["message"], (chat, error)
            for name in ("zz", "../x", "/etc", "a0/../a1", "", "A" * 300, "a0\0", "é", BOOK):
                for stream in (False, True):
                    error = error_of(await complete(client, name, stream=stream), 404)
                    assert error["code"] == "model_not_found" and error["param"] == "model"
            error_of(await client.get("/v1/models/zz"), 404)
            error_of(await client.get("/v2/nothing"), 404)
            error_of(await client.get("/v1/completions"), 405)
            error_of(await client.post("/v1/completions", content=b'{"model": '), 400)
            error_of(await client.post("/v1/completions", content=b"[" * 9000, headers={"content-type": "application/json"}), 400)
            lone = b'{"model": "a0", "prompt": "\\ud800", "max_tokens": 2}'
            error_of(await client.post("/v1/completions", content=lone, headers={"content-type": "application/json"}), 400)
            nan = b'{"model": "a0", "prompt": "x", "temperature": NaN}'
            error_of(await client.post("/v1/completions", content=nan, headers={"content-type": "application/json"}), 400)
            error_of(await client.post("/v1/completions", content=b"x" * 30_000), 413)

            async def unannounced():
                for _ in range(30):
                    yield b"x" * 1000
            error_of(await client.post("/v1/completions", content=unannounced()), 413)
            busy = error_of(full := await complete(client, "a0", n=9), 429)
            assert busy["code"] == "queue_full" and full.headers["retry-after"] == "1"
            named = await client.get("/health", headers={"x-request-id": "abc-1"})
            assert named.headers["x-request-id"] == "abc-1"
            assert len((await client.get("/health", headers={"x-request-id": "a b\"c"})).headers["x-request-id"]) == 32
            assert service.loop.failed is None and text_of(await complete(client, "a1")) == saved[1]("a1", TEXT).text
            await idle(service)
    asyncio.run(main())


def test_limits_of_length_and_time(saved):
    async def main():
        async with serving(saved[0], max_prompt=4, max_seconds=0.15) as (client, service):
            assert error_of(await complete(client, "a0"), 400)["code"] == "context_length_exceeded"
            late = {**LONG, "prompt": "th", "model": "a0", "n": 16}
            assert error_of(await client.post("/v1/completions", json=late), 504)["type"] == "timeout_error"
            streamed = await client.post("/v1/completions", json={**late, "stream": True})
            error = events(streamed.text)[-1]["error"] if streamed.status_code == 200 else error_of(streamed, 504)  # before the first token
            assert error["code"] == "timeout"
            await idle(service)
        async with serving(saved[0], pool_bytes=40_000) as (client, service):  # less memory than the context needs
            assert "pages" in error_of(await complete(client, "tiny", tokens=200), 400)["message"]
            assert text_of(await complete(client, "tiny")) == saved[1]("tiny", TEXT).text
    asyncio.run(main())


async def leave(app, service, body, *, when):
    """Send a request and go away: "queued" (no answer yet) or "streaming" (after two events). Returns the ASGI messages sent."""
    sent, gone, content = [], asyncio.Event(), json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if when == "streaming" and len(sent) > 3:
            gone.set()

    async def watch():
        await running(service)
        if when == "queued":
            gone.set()

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/completions",
             "raw_path": b"/v1/completions", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80),
             "scheme": "http", "root_path": ""}
    await asyncio.gather(app(scope, receive, send), watch())
    return sent


def test_who_goes_away_frees_the_memory(saved):
    async def main():
        app = make_app(saved[0])
        service = app.state.service
        async with app.router.lifespan_context(app):
            for when, stream in (("queued", False), ("streaming", True)):
                await leave(app, service, {**LONG, "model": "a0", "n": 3, "stream": stream}, when=when)
                await idle(service)
            text = service.metrics.text().decode()
            assert 'graftwork_requests_total{adapter="a0",reason="abort"} 6.0' in text
            written = float(re.search(r'graftwork_generated_tokens_total{adapter="a0"} (\S+)', text)[1])
            assert written < 6 * 200
    asyncio.run(main())


def test_a_broken_adapter_fails_its_own_requests_only(fleet, saved):
    shutil.move(fleet / "a2", fleet / "broken")
    tensors = next((fleet / "broken").glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 255
    tensors.write_bytes(content)
    (fleet / "pickle").mkdir()
    (fleet / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (fleet / "pickle" / "adapter_config.json").write_text("{}")
    (fleet / "cut").mkdir()
    (fleet / "cut" / "graft.json").write_text('{"method": ')
    (fleet / "odd").mkdir()
    (fleet / "odd" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "many"}')
    (fleet / "odd" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    (fleet / "linked").symlink_to(fleet / "a0")
    (fleet / "inner").mkdir()
    for file in (fleet / "a0").iterdir():
        (fleet / "inner" / file.name).symlink_to(file)
    shutil.copytree(fleet / "a0", fleet / "copy")  # says that it is what a0 is, and is not
    (fleet / "copy" / tensors.name).write_bytes(content)
    bad = ["broken", "pickle", "cut", "odd", "inner"]

    async def main():
        async with serving(fleet) as (client, service):
            names = ["a0", *bad, "tiny", "a1"]
            for stream in (False, True):
                found = dict(zip(names, await asyncio.gather(*(complete(client, name, stream=stream) for name in names))))
                for name in bad:
                    assert error_of(found[name], 400)["code"] == "adapter_unusable", name
            for name in ("a0", "tiny", "a1"):
                assert text_of(await complete(client, name)) == saved[1](name, TEXT).text
            error_of(await complete(client, "linked"), 404)

            def waits():
                pinned = service.catalog.pin("a0").removeprefix("=")
                service.catalog.hosts.clear()
                return service.catalog.host(pinned).folder

            assert await service.loop.call(waits) == fleet / "a0"
            assert "linked" not in [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
            await idle(service)
            assert (await client.get("/health")).status_code == 200
    asyncio.run(main())


def test_an_engine_that_fails_says_so(saved):
    async def main():
        async with serving(saved[0]) as (client, service):
            assert (await client.get("/ready")).status_code == 200
            step, calls = service.engine.step, []

            def failing():
                calls.append(1)
                if len(calls) > 3:
                    raise RuntimeError("a kernel went wrong")
                return step()

            service.engine.step = failing
            whole, stream = await asyncio.gather(complete(client, "a0", tokens=50, ignore_eos=True),
                                                 complete(client, "a1", tokens=50, ignore_eos=True, stream=True))
            assert "RuntimeError" in error_of(whole, 503)["message"]
            assert stream.status_code == 503 or events(stream.text)[-1]["error"]["code"] == "unavailable"
            assert (await client.get("/health")).status_code == 503 and (await client.get("/ready")).status_code == 503
            error_of(await complete(client, "a0"), 503)
            assert "graftwork_engine_up 0.0" in (await client.get("/metrics")).text
    asyncio.run(main())


# -- adapters at run time ------------------------------------------------------------------------------------------------------------
def test_adapters_are_loaded_replaced_and_unloaded_while_it_runs(fleet, saved, tmp_path):
    answer, other = saved[1], tmp_path / "other"
    shutil.copytree(fleet / "a1", other / "spare")
    shutil.move(fleet / "a2", other / "a2")
    (fleet / "out").symlink_to(other / "spare")
    (fleet / "far").symlink_to("/etc")
    shutil.copytree(fleet / "a1", fleet / "run" / "graft")  # as `graft train` leaves it

    async def main():
        async with serving(fleet) as (client, _):
            error_of(await client.post("/v1/load_lora_adapter", json={"lora_name": "n", "lora_path": "a0"}), 403)
            error_of(await client.post("/v1/unload_lora_adapter", json={"lora_name": "a0"}), 403)
        async with serving(fleet, allow_load=True, roots=[other]) as (client, service):
            async def load(name, path, **fields):
                return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})

            for name in ("../x", "/etc", "", "a b", "tiny", ".hidden", "x" * 200):
                assert "no name" in error_of(await load(name, "a0"), 400)["message"]
            for path in ("../other/spare/../../x", "/etc", tmp_path, "out/../../../etc", "far", "a0\0", "x" * 300, fleet, "."):
                assert "lora_path" in error_of(await load("n", path), 400)["message"], path
            assert text_of(await complete(client, "run")) == answer("a1", TEXT).text
            error_of(await load("n", "nowhere"), 400)
            error_of(await load("n", "a0", foo=1), 400)
            error_of(await complete(client, "n"), 404)
            assert "already" in error_of(await load("a0", "a1"), 400)["message"]

            assert (await load("n", other / "spare")).text == "Success: LoRA adapter 'n' added successfully."
            assert text_of(await complete(client, "n")) == answer("a1", TEXT).text
            listed = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
            assert sorted(listed) == ["a0", "a1", "n", "run", "tiny"] and listed["tiny"]["parent"] is None
            assert listed["n"]["parent"] == "tiny" and listed["n"]["root"] == str(other / "spare")
            assert (await client.get("/v1/models/n")).json() == listed["n"]

            # replaced while a request writes: that one ends as it began, the next one gets the new content and no old prefix
            before = text_of(await complete(client, "n", tokens=100, ignore_eos=True))
            long = asyncio.create_task(complete(client, "n", tokens=100, ignore_eos=True))
            await running(service)
            assert "replaced" in (await load("n", "a0", load_inplace=True)).text
            assert text_of(await complete(client, "n")) == answer("a0", TEXT).text
            assert text_of(await long) == before
            (other / "bad").mkdir()
            error_of(await load("n", other / "bad", load_inplace=True), 400)
            assert text_of(await complete(client, "n")) == answer("a0", TEXT).text

            # files replaced on disk
            shutil.rmtree(other / "spare")
            shutil.copytree(other / "a2", other / "spare")
            assert (await load("m", other / "spare")).status_code == 200
            assert text_of(await complete(client, "m")) == answer("a2", TEXT).text
            shutil.rmtree(other / "spare")
            shutil.copytree(fleet / "a1", other / "spare")
            assert text_of(await complete(client, "m")) == answer("a1", TEXT).text

            # unloaded while a request writes
            long = asyncio.create_task(complete(client, "a1", tokens=100, ignore_eos=True))
            await running(service)
            assert "removed" in (await client.post("/v1/unload_lora_adapter", json={"lora_name": "a1"})).text
            error_of(await complete(client, "a1"), 404)
            error_of(await client.post("/v1/unload_lora_adapter", json={"lora_name": "a1"}), 404)
            assert text_of(await long) == before
            await idle(service)
        async with serving(fleet, allow_load=True, roots=[other]) as (client, service):  # after a restart
            assert service.catalog.names() == ["a0", "m", "n", "run"]
            assert text_of(await complete(client, "n")) == answer("a0", TEXT).text
            assert (await client.post("/v1/load_lora_adapter", json={"lora_name": "a1", "lora_path": "a1"})).status_code == 200
            assert text_of(await complete(client, "a1")) == answer("a1", TEXT).text
        async with serving(fleet) as (client, service):  # a folder that is allowed no longer
            assert service.catalog.names() == ["a0", "a1", "n", "run"]
    asyncio.run(main())


# -- keys and metrics ----------------------------------------------------------------------------------------------------------------
def write_keys(path, *rows):
    lines = [json.dumps({"sha256": hashlib.sha256(row["name"].encode()).hexdigest(), **row}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_keys_decide_who_may_use_what(fleet, saved, tmp_path):
    keys = read_keys(write_keys(tmp_path / "keys", {"name": "alice", "adapters": ["a*"], "requests_per_minute": 3},
                                {"name": "bob", "adapters": ["tiny", "a1", "n"], "manage": True}))

    async def main():
        async with serving(fleet, keys=keys, allow_load=True) as (client, service):
            for headers in ({}, {"authorization": "Bearer nobody"}, {"authorization": "Basic alice"}, {"authorization": "Bearer"}):
                for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize"),
                                     ("POST", "/v1/load_lora_adapter")):
                    response = await client.request(method, path, headers=headers, json={} if method == "POST" else None)
                    assert error_of(response, 401)["code"] == "invalid_api_key"
            assert (await client.get("/health")).status_code == 200
            alice, bob = ({"authorization": f"Bearer {name}"} for name in ("alice", "bob"))

            async def ask(model, headers):
                return await client.post("/v1/completions", headers=headers,
                                         json={"model": model, "prompt": TEXT, "max_tokens": 8, "temperature": 0})

            assert text_of(await ask("a0", alice)) == saved[1]("a0", TEXT).text
            hidden, missing = error_of(await ask("tiny", alice), 404), error_of(await ask("zz", bob), 404)
            assert hidden["message"].replace("tiny", "zz") == missing["message"]
            error_of(await client.post("/v1/load_lora_adapter", headers=alice, json={"lora_name": "n", "lora_path": "a0"}), 403)
            limited = await ask("a0", alice)
            assert error_of(limited, 429)["code"] == "rate_limit_exceeded" and 1 <= int(limited.headers["retry-after"]) <= 61
            keys.keys[0].seen[0] -= 61  # a minute later
            assert text_of(await ask("a0", alice)) == saved[1]("a0", TEXT).text
            error_of(await ask("a0", bob), 404)
            assert text_of(await ask("a1", bob)) == saved[1]("a1", TEXT).text
            assert [m["id"] for m in (await client.get("/v1/models", headers=bob)).json()["data"]] == ["tiny", "a1"]
            loaded = await client.post("/v1/load_lora_adapter", headers=bob, json={"lora_name": "n", "lora_path": "a0"})
            assert loaded.status_code == 200
            error_of(await client.post("/v1/unload_lora_adapter", headers=bob, json={"lora_name": "a0"}), 403)
    asyncio.run(main())


@pytest.mark.parametrize("line, words", [("{", "keys:1"), ("[]", "object"), ('{"name": "a"}', "sha256"), ("", "no keys"),
                                         ('{"name": "a", "sha256": "%s", "rpm": 3}' % ("0" * 64), "unknown field 'rpm'"),
                                         ('{"name": "a", "sha256": "%s", "requests_per_minute": 0}' % ("0" * 64), "requests_per_minute"),
                                         ('{"name": "a", "sha256": "%s"}\n' % ("0" * 64) * 2, "same name")])
def test_wrong_key_files(tmp_path, line, words):
    (tmp_path / "keys").write_text(line)
    with pytest.raises(DataError, match=words):
        read_keys(tmp_path / "keys")


def test_metrics_count(saved, caplog):
    async def main():
        async with serving(saved[0]) as (client, service):
            await asyncio.gather(complete(client, "a0"), complete(client, "a0", tokens=2), complete(client, "tiny"), complete(client, "zz"))
            text = (await client.get("/metrics")).text
        wanted = [saved[1]("a0", TEXT), saved[1]("tiny", TEXT)]
        values = dict(re.findall(r"^(graftwork_\S+) (\S+)$", text, re.M))
        assert sum(float(value) for key, value in values.items() if key.startswith('graftwork_requests_total{adapter="a0"')) == 2
        prompt = len(encode_prompt(tiny.tokenizer(), TEXT))
        assert float(values['graftwork_prompt_tokens_total{adapter="a0"}']) == 2 * prompt
        assert float(values['graftwork_generated_tokens_total{adapter="a0"}']) == wanted[0].tokens + 2
        assert float(values['graftwork_generated_tokens_total{adapter="tiny"}']) == wanted[1].tokens
        assert float(values["graftwork_adapters_resident"]) == float(values["graftwork_adapter_loads"]) == 1
        assert float(values["graftwork_requests_running"]) == float(values["graftwork_requests_waiting"]) == 0
        assert float(values["graftwork_pool_pages_used"]) > 0 and float(values["graftwork_time_to_first_token_seconds_count"]) == 3
        assert float(values['graftwork_http_responses_total{route="/v1/completions",status="404"}']) == 1
        assert "zz" not in text
    with caplog.at_level("INFO", "graftwork.serve"):
        asyncio.run(main())
    lines = [record.facts for record in caplog.records if record.getMessage() == "request"]
    assert any(line["model"] == "a0" and line["status"] == 200 and line["completion_tokens"] == 2 and len(line["id"]) == 32
               for line in lines if "model" in line)


# -- through sockets -----------------------------------------------------------------------------------------------------------------
@contextmanager
def listening(app):
    """The base URL of the app behind uvicorn."""
    import uvicorn

    from graftwork.serving.http.server import bind

    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


def test_the_official_client_works_unchanged(saved):
    openai = pytest.importorskip("openai")
    folder, answer = saved
    app = make_app(folder)
    with listening(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert sorted(m.id for m in client.models.list()) == ["a0", "a1", "a2", "tiny"]
        assert client.models.retrieve("a0").parent == "tiny"
        for name in ("a0", "tiny"):
            done = client.completions.create(model=name, prompt=TEXT, max_tokens=8, temperature=0)
            assert done.choices[0].text == answer(name, TEXT).text and done.usage.completion_tokens == answer(name, TEXT).tokens
        chat = client.chat.completions.create(model="a1", messages=CHAT, max_completion_tokens=8, temperature=0, logprobs=True,
                                              top_logprobs=1, user="u", extra_body={"top_k": 5, "repetition_penalty": 1.0})
        assert chat.choices[0].message.content == answer("a1", CHAT).text and chat.choices[0].logprobs.content
        stream = client.chat.completions.create(model="a2", messages=CHAT, max_tokens=8, temperature=0, stream=True,
                                                stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer("a2", CHAT).text
        assert chunks[-1].usage.completion_tokens == answer("a2", CHAT).tokens
        pieces = client.completions.create(model="a1", prompt=TEXT, max_tokens=8, temperature=0, stream=True)
        assert "".join(c.choices[0].text for c in pieces) == answer("a1", TEXT).text
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="zz", prompt="x")
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError, match="nonsense"):
            client.completions.create(model="a0", prompt="x", extra_body={"nonsense": 1})
        leaving = client.completions.create(model="a0", stream=True, extra_body={"ignore_eos": True}, prompt=TEXT, max_tokens=200, n=4)
        next(iter(leaving))
        leaving.close()
        service, until = app.state.service, time.monotonic() + 10
        while service.loop.open and time.monotonic() < until:
            time.sleep(0.02)
        assert service.loop.open == 0
        assert 'reason="abort"' in service.metrics.text().decode()
        client.close()


def test_sigterm_lets_answers_end(saved, tmp_path):
    base = tiny.save(tiny.llama(), tmp_path / "tiny")
    command = [sys.executable, "-m", "graftwork.cli.main", "serve", "--model", str(base), "--adapters", str(saved[0]), "--port", "0",
               "--pool", "1MiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "listening on" in line:
                break
        url = re.search(r"http://\S+", lines[-1] if lines else "")
        assert url, lines
        wanted = saved[1]("a0", TEXT, 100)
        body = {"model": "a0", "prompt": TEXT, "max_tokens": 100, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url[0]}/v1/completions", json=body, timeout=60) as response:
            text = ""
            for piece in response.iter_text():
                if not text:
                    process.send_signal(signal.SIGTERM)
                text += piece
        assert "".join(c["choices"][0]["text"] for c in events(text)) == wanted.text
        assert process.wait(20) == 0
        rest = process.stderr.read()
        logged = [json.loads(line) for line in (*lines, *rest.splitlines()) if line.startswith("{")]
        assert any(line["event"] == "request" and line["model"] == "a0" for line in logged if "model" in line)
        assert rest.rstrip().endswith("stopped") and process.stdout.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url[0]}/health")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        process.stdout.close()


# -- the verb ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, words", [
    (["--policy", "early_abort"], "--deadline"), (["--deadline", "3"], "early_abort"), (["--policy", "fair"], "--api-keys"),
    (["--allow-load"], "--adapters"), (["--max-running", "0"], "--max-running"), (["--adapters", "nowhere"], "no folder nowhere"),
    (["--merge", "--storage", "nf4"], "--storage says nf4"),
    (["--allow-source", "memory://ok"], "--adapters"), (["--disk-cache", "1GiB"], "--allow-source"),
    (["--adapters", ".", "--allow-source", "nosuch://a"], "nosuch"), (["--adapters", ".", "--allow-source", "a/b"], "no URL"),
    (["--pool", "much"], "much"), (["--api-keys", "nowhere"], "nowhere"), (["--port", "99999"], "99999")])
def test_wrong_options(options, words, capsys):
    from graftwork.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "nowhere", *options])
    err = capsys.readouterr().err
    assert ended.value.code in (1, 2) and words in err and "remedy" in err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    from graftwork.cli.main import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "x"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "graftwork[serve]" in err
