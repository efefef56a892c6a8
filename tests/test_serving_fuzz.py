"""Whatever a client sends, the server answers with a status of the client's kind and an error of OpenAI's shape, and goes on."""

import contextlib
import json
import math
import os
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tiny
from graftwork.serving.http import server
from test_engine import saved_adapters
from test_http import make_app

pytestmark = pytest.mark.slow

DOCUMENTED = (503, 504)  # of the fives
JSON = {"content-type": "application/json"}


def examples(count):
    return settings(max_examples=int(count * float(os.environ.get("GRAFTWORK_FUZZ", "1"))), suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def listening(app):
    """(host, port) of the app behind uvicorn as `graft serve` sets it up."""
    import uvicorn

    sock = server.bind("127.0.0.1", 0)
    running = uvicorn.Server(server.settings(app, 2))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()
    finally:
        running.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with adapters a0 (LoRA), a1 (PaCA), a2 (FLoRA): its app and its address."""
    folder = tmp_path_factory.mktemp("fleet")
    saved_adapters(folder, tiny.llama(), 3)
    with healthy(folder) as served:
        yield served


@contextlib.contextmanager
def healthy(folder, **options):
    app = make_app(folder, allow_load=True, max_body=50_000, max_seconds=2.0, **options)
    with listening(app) as where:
        yield app, where
    assert app.state.service.loop.failed is None


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url="http://{}:{}".format(*served[1]), timeout=60) as client:
        yield client
        assert client.get("/health").status_code == 200


def proper(response):
    """The status, after a look at the answer."""
    status = response.status_code
    assert status < 500 or status in DOCUMENTED, (status, response.text)
    if status >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] and error["code"], error
    return status


# -- the OpenAPI document ------------------------------------------------------------------------------------------------------------
POST = ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/detokenize"]
GET = ["/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics"]


@pytest.mark.parametrize("path, negative", [*((path, False) for path in POST + GET), *((path, True) for path in POST)])
def test_every_operation_keeps_to_its_description(served, path, negative):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

    app, where = served
    described = schemathesis.openapi.from_dict(app.openapi())
    operation = next(iter(described[path].values()))
    mode = schemathesis.GenerationMode.NEGATIVE if negative else schemathesis.GenerationMode.POSITIVE

    @examples(20)
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from([None, "a0", "tiny"]))
    def send(case, model):
        if model is not None and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = model
        response = case.call(base_url="http://{}:{}".format(*where), timeout=60)
        if response.status_code not in DOCUMENTED:
            case.validate_response(response, checks=[not_a_server_error])
        case.validate_response(response, checks=[content_type_conformance, response_schema_conformance, status_code_conformance])

    send()


# -- bodies of our own ---------------------------------------------------------------------------------------------------------------
ROUTES = {
    "/v1/completions": {"model": "a0", "prompt": "the user", "max_tokens": 3, "stop": "x", "n": 1, "seed": 1, "temperature": 0.5,
                        "stream": True, "logit_bias": {"40": 1.0}, "stop_token_ids": [5], "response_format": {"type": "text"}},
    "/v1/chat/completions": {"model": "a1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "top_logprobs": 1,
                             "logprobs": True, "tools": [], "metadata": {"a": "b"}},
    "/v1/load_lora_adapter": {"lora_name": "n", "lora_path": "a0", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "zz"},
    "/tokenize": {"model": "a0", "prompt": "the user", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6]}}


class Raw(str):
    """JSON as it is to be sent."""


def nested(depth, opening="[", closing="]"):
    return Raw(opening * depth + closing * depth)


ODD = [Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("-" + "9" * 400), Raw("0." + "3" * 4000), Raw('"\\ud800"'),
       Raw('"\\udfff\\ud800"'), Raw('"\\u0000"'), Raw('"a\\u0000b"'), nested(50), nested(900), nested(20_000), nested(3000, '{"a":', "}"),
       Raw('{"": ""}'), Raw('{"\\ud800": 1}'), None, True, "", "\x7f", "../x", "/etc/passwd", "x" * 5000, -1, 2**63, 0.0, -0.0, [], {},
       [[]], [None], [{}], {"a": {}}, "é" * 40, "\u202e", "a%2f..", [5] * 300, ["x"] * 300]
leaves = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20))
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
                      max_leaves=6)


def written(value):
    """JSON text; surrogates and what is Raw stay as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


@st.composite
def calls(draw):
    """(path, body): a good body with some fields replaced, added or left out; or anything."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    if draw(st.integers(0, 9)) == 0:
        return path, written(draw(values))
    body = dict(ROUTES[path])
    for field in draw(st.lists(st.sampled_from([*body, "guided_json", "nonsense", "user", "seed", "top_p"]), min_size=1, max_size=3)):
        body[field] = draw(values)
    if draw(st.booleans()):
        body.pop(draw(st.sampled_from(sorted(body))))
    return path, written(body)


@examples(150)
@given(calls())
def test_odd_bodies(client, call):
    path, body = call
    proper(client.post(path, content=body.encode("utf-8", "surrogatepass"), headers=JSON))


@examples(60)
@given(st.sampled_from(sorted(ROUTES)), st.binary(max_size=200),
       st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
                        "application/json; charset=utf-16", "image/png", "", "application/octet-stream"]), st.booleans())
@example("/v1/completions", b'{"model": "a0", "prompt": "\xff"}', "application/json", True)
@example("/tokenize", b"\xef\xbb\xbf{}", "application/json", True)
def test_bytes_that_are_no_json(client, path, content, kind, cut):
    if not cut:
        content = json.dumps(ROUTES[path]).encode()[: len(content)] + content
    assert proper(client.post(path, content=content, headers={"content-type": kind})) in range(400, 500)


numbers = st.one_of(st.sampled_from([0.0, 1e-300, 1e-5, 1e-4, 0.01, 1.0, 2.0, 100.0, 1e300, math.pi]), st.floats(0, 100))


@examples(60)
@given(st.fixed_dictionaries({}, optional={
    "temperature": numbers, "top_p": st.one_of(st.just(1e-320), st.floats(0, 1, exclude_min=True)), "top_k": st.integers(-1, 200),
    "min_p": st.floats(0, 1), "repetition_penalty": st.floats(0.01, 100), "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2), "seed": st.one_of(st.integers(), st.just(-(10**300))), "n": st.integers(1, 4),
    "logit_bias": st.dictionaries(st.integers(0, 127).map(str), st.sampled_from([-100, 100, 0.5]), max_size=128),
    "stop_token_ids": st.sampled_from([[], list(range(128)), [0, 1, 2]]), "min_tokens": st.integers(0, 6),
    "logprobs": st.integers(0, 20), "stop": st.sampled_from(["e", ["t", "the "], "\n"]), "ignore_eos": st.booleans()}))
@example({"stop_token_ids": list(range(128)), "min_tokens": 4, "temperature": 1.0, "logprobs": 5})
@example({"logit_bias": {str(i): -100 for i in range(128)}, "temperature": 1e-4, "min_p": 1.0, "logprobs": 20})
def test_extreme_sampling_ends_in_an_answer(client, fields):
    response = client.post("/v1/completions", json={"model": "a0", "prompt": "the user", "max_tokens": 6, **fields})
    assert proper(response) == 200, (fields, response.text)


GRAMMARS = st.one_of(
    st.text(alphabet="ab()[]{}|*+?.^$\\-0123,é\ud83d ", max_size=20).map(lambda text: {"guided_regex": text}),
    st.text(alphabet='start: "ab" | x /[a-z]/ %?*+()\n', max_size=40).map(lambda text: {"guided_grammar": "start: " + text}),
    values.map(lambda value: {"guided_json": value}),
    st.dictionaries(st.sampled_from("type enum pattern minLength maxLength items properties required $ref anyOf minimum multipleOf const "
                                    "format minItems additionalProperties".split()),
                    st.one_of(values, st.sampled_from(["object", "array", "string", "#", "integer", "(", "date", 10**9, {"$ref": "#"}])),
                    max_size=4).map(lambda schema: {"guided_json": schema}))


@examples(80)
@given(GRAMMARS)
@example({"guided_regex": "é+"})
@example({"guided_regex": "(a{1,900}){1,900}"})
@example({"guided_grammar": "start: start"})
@example({"guided_json": {"$ref": "#"}})
@example({"guided_json": nested(900, '{"items":', "}")})
def test_odd_grammars(client, fields):
    body = written({"model": "a0", "prompt": "the user", "max_tokens": 4, "temperature": 0, **fields})
    assert proper(client.post("/v1/completions", content=body.encode("utf-8", "surrogatepass"), headers=JSON)) in (200, 400, 413)


# -- sockets -------------------------------------------------------------------------------------------------------------------------
def exchange(where, *pieces, pause=0.0):
    """All that the server says to these bytes until it closes the connection. Raises TimeoutError if it never does."""
    with socket.create_connection(where, timeout=10) as sock:
        said = b""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause)
            while got := sock.recv(65536):
                said += got
        return said


def status_of(said):
    head, _, content = said.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    if status >= 400:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    return status


def head(path="/v1/completions", method="POST", **headers):
    lines = {"host": "x", "content-type": "application/json", "connection": "close", **headers}
    return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


def test_heads_that_are_too_long_or_no_http(served):
    app, where = served
    many = b"GET / HTTP/1.1\r\n" + b"".join(f"x{i}: y\r\n".encode() for i in range(100_000))
    for sent in (head(x="y" * 1_000_000), head("/" + "y" * 1_000_000), b"\x16\x03\x01\x02\x00\r\n\r\n", head(content_length="9" * 30),
                 head(content_length="-1"), b"GET\r\n\r\n", head(transfer_encoding="chunked") + b"zz\r\n", many):
        assert status_of(exchange(where, sent)) == 400, sent[:200]
    assert status_of(exchange(where, head(content_length=10**12))) == 413
    assert status_of(exchange(where, head("/v1/models/..%2f..%2fetc", "GET"))) == 404
    assert status_of(exchange(where, head("/v1/models/%00%ff", "GET"))) == 404
    assert status_of(exchange(where, head("/v1/models", "BREW"))) == 405
    assert status_of(exchange(where, head("/health", "GET", expect="100-continue", upgrade="websocket", x_request_id="\x7f"))) in (200, 400)


@pytest.fixture
def impatient(tmp_path):
    """A server of its own: with half a second for a body, a busy machine makes every client slow now and then."""
    saved_adapters(tmp_path, tiny.llama(), 1)
    with healthy(tmp_path, body_seconds=0.5) as served:
        yield served


def test_clients_that_are_slow_are_cut_off(impatient, monkeypatch):
    app, where = impatient
    body = json.dumps({**ROUTES["/v1/completions"], "stream": False}).encode()
    half = head(content_length=len(body))
    assert status_of(exchange(where, half, *(body[i: i + 1] for i in range(10)), pause=0.02)) == 408  # body_seconds is 0.5
    assert status_of(exchange(where, half, body[:60], body[60:], pause=0.05)) == 200  # slow, but not too slow
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    assert exchange(where, b"POST /v1/comp", b"letions HTTP/1.1\r\n", b"host:", pause=0.3) == b""  # closed before anything was asked
    assert exchange(where) == b""
    again = exchange(where, head("/health", "GET", connection="keep-alive"), b"GET /health HT", pause=0.4)
    assert status_of(again) == 200  # and closed, or exchange would have waited
    # what goes on for longer than that is left alone, and so is what follows it
    slow = json.dumps({"model": "a0", "prompt": "the user", "max_tokens": 250, "ignore_eos": True, "n": 8}).encode()
    said = exchange(where, head(content_length=len(slow), connection="keep-alive") + slow + head("/health", "GET"))
    assert said.count(b"HTTP/1.1 ") == 2 and b'{"status":"ok"}' in said
    until = time.monotonic() + 10
    while app.state.service.loop.open and time.monotonic() < until:
        time.sleep(0.02)
    assert app.state.service.loop.open == 0
