"""The page in a real browser: what a reader does, and that the columns hold what the API answers."""

import contextlib
import io
import json
import shlex
import time

import httpx
import pytest

import browser
import tiny
from test_engine import saved_adapters
from test_http import TEXT, listening, make_app, write_keys

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)]
FIELDS = {"prompt": TEXT, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """a0, a1, a2, and 3,000 folders more whose names are all that is known of them."""
    folder = tmp_path_factory.mktemp("fleet")
    saved_adapters(folder, tiny.llama(), 3)
    for number in range(3000):
        (folder / f"team-{number % 40}-task-{number}").mkdir()
    return folder


@pytest.fixture(scope="module")
def tab():
    opened = browser.Browser()
    opened.view(1280, 900)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def served(fleet):
    """(address, service) of a server whose every step says who took part in it."""
    app = make_app(fleet)
    service = app.state.service
    service.work, schedule = [], service.engine.scheduler.step

    def scheduled():
        step = schedule()
        service.work.append({request.adapter for request, _ in step.work})
        return step
    service.engine.scheduler.step = scheduled
    with listening(app) as url:
        yield url, service


@pytest.fixture(autouse=True)
def nothing_went_wrong(tab):
    del tab.events[:]
    yield
    assert not tab.problems()


def api(url, path, **body):
    response = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def columns(tab):
    """[{name, state, text, and every figure}], from left to right."""
    return tab.evaluate("""[...document.querySelectorAll(".column")].map((column) => ({
        name: column.dataset.name, state: column.dataset.state, text: column.querySelector(".answer").textContent,
        complaint: column.querySelector(".complaint").hidden ? null : column.querySelector(".complaint").firstChild.textContent,
        ...Object.fromEntries([...column.querySelectorAll("[data-figure]")].map((each) => [each.dataset.figure, each.textContent]))}))""")


def settled(tab, state="done"):
    tab.until(f"document.body.dataset.state === '{state}'")
    return columns(tab)


def shown(tab, selector):
    return tab.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def test_a_link_compares_in_one_batch_and_shows_what_the_api_answers(tab, served):
    url, service = served
    names = ["a0", "tiny", "a1"]
    del service.work[:]
    tab.open(str(httpx.URL(url, params={"adapters": ",".join(names), "mode": "completion", "max_tokens": 24, "prompt": TEXT, "run": 1})))
    found = settled(tab)
    assert max(map(len, service.work)) == 3, "no step had a token of each"
    assert [column["name"] for column in found] == names
    for column in found:
        wanted = api(url, "/v1/completions", model=column["name"], **FIELDS)
        assert column["text"] == wanted["choices"][0]["text"] and column["state"] == "done" and column["complaint"] is None
        assert column["finish"] == wanted["choices"][0]["finish_reason"]
        assert int(column["tokens"]) == wanted["usage"]["completion_tokens"]
        assert column["first"].endswith("s") and float(column["speed"].replace(",", "")) > 0
    assert all(address.startswith(url) for address in tab.requested())
    status = httpx.get(f"{url}/v1/status").json()
    tab.until(f"document.querySelector('#steps').textContent === {json.dumps(format(status['steps'], ','))}")
    assert shown(tab, "#resident") == "2" and shown(tab, "#base-name") == "tiny"
    assert tab.evaluate("document.querySelector('#health').dataset.state") == "live"
    assert shown(tab, "#pool-use").startswith(f"{round(100 * status['pool']['used'] / status['pool']['pages'])} %")
    rows = tab.evaluate("[...document.querySelectorAll('#adapters tr')].map((row) => row.firstChild.textContent)")
    assert rows == [each["names"][0] for each in status["adapters"]["list"]]
    # as many colors as the pool has owners of another kind: free, prefixes, weights of two adapters
    colors = """(canvas => new Set(new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
        .data.buffer)).size)(document.querySelector("#map"))"""
    assert tab.evaluate(colors) >= 4
    legend = tab.evaluate("[...document.querySelectorAll('#legend li')].map((line) => line.innerText.split('\\n').join(' '))")
    free = next(line for line in legend if line.startswith("free"))
    assert int(free.split()[-1].replace(",", "")) == status["pool"]["free"] and any("a0 weights" in line for line in legend)


def test_typing_choosing_and_sending_by_keyboard(tab, served):
    url, service = served
    tab.open(url)
    tab.until("document.querySelectorAll('.column').length === 2")
    assert [column["name"] for column in columns(tab)] == ["tiny", "a0"]
    tab.type("#search", "task-29 te")
    tab.until("!document.querySelector('#drop').hidden")
    assert "60 of 111 shown" in shown(tab, "#drop-note") and tab.evaluate("document.querySelectorAll('#options li').length") == 60
    tab.type("#search", "a2")
    tab.until("document.querySelectorAll('#options li')[0].dataset.name === 'a2'")
    assert tab.evaluate("document.querySelector('#search').getAttribute('aria-activedescendant')") == "option-0"
    tab.press("Enter", 13)
    tab.until("document.querySelectorAll('.column').length === 3")
    tab.evaluate("document.querySelector('#search').focus()")
    tab.press("ArrowDown", 40)
    tab.press("ArrowDown", 40)
    tab.press("Enter", 13)  # the third of all: a1
    tab.press("Enter", 13)  # and away again
    tab.press("Escape", 27)
    assert tab.evaluate("document.querySelector('#drop').hidden")
    assert [column["name"] for column in columns(tab)] == ["tiny", "a0", "a2"]
    tab.click("button[aria-label='Remove tiny']")
    tab.press("Enter", 13, ctrl=True)
    assert shown(tab, "#complaint") == "Write a prompt first." and tab.evaluate("document.activeElement.id") == "prompt"
    tab.type("#prompt", "hi")
    tab.type("#max_tokens", "9")
    tab.evaluate("document.querySelector('#prompt').focus()")
    tab.press("Enter", 13, ctrl=True)
    for column in settled(tab):
        said = [{"role": "user", "content": "hi"}]
        wanted = api(url, "/v1/chat/completions", model=column["name"], messages=said, max_tokens=9, temperature=0)
        assert column["text"] == wanted["choices"][0]["message"]["content"] and column["name"] in ("a0", "a2")
    assert shown(tab, "#announce").count("tokens") == 2


def test_stop_ends_the_requests(tab, served):
    url, service = served
    step, left = service.engine.step, [12]

    def few():  # twelve steps, and then none until somebody stops it
        if not left[0]:
            time.sleep(0.005)
            return True
        left[0] -= 1
        return step()

    service.engine.step = few
    try:
        tab.open(str(httpx.URL(url, params={"adapters": "a0,a1", "mode": "completion", "max_tokens": 200, "prompt": TEXT, "run": 1})))
        tab.until("[...document.querySelectorAll('.answer')].filter((answer) => answer.textContent.length > 3).length === 2")
        assert tab.evaluate("document.querySelector('#send').disabled")
        tab.until("document.querySelector('#running').textContent === '2'")
        assert tab.evaluate("[...document.querySelectorAll('#requests tr')].map((row) => row.children[1].textContent)") == ["writing"] * 2
        assert tab.evaluate("document.querySelector('#requests td').offsetWidth") > 140  # room for a name
        tab.click("#stop")
        found = settled(tab)
        assert [(column["state"], column["finish"]) for column in found] == [("stopped", "stopped")] * 2
        assert all(column["text"] and 0 < int(column["tokens"]) < 200 for column in found)
        until = time.monotonic() + 20
        while service.loop.open and time.monotonic() < until:
            time.sleep(0.01)
        assert service.loop.open == 0
    finally:
        service.engine.step = step
    assert not tab.evaluate("document.querySelector('#send').disabled")


def test_errors_are_shown_as_the_server_words_them(tab, served):
    url, service = served
    tab.open(str(httpx.URL(url, params={"adapters": "nowhere,a0,team-1-task-1", "prompt": TEXT, "mode": "completion", "run": 1})))
    found = {column["name"]: column for column in settled(tab)}
    for name in ("nowhere", "team-1-task-1"):
        error = httpx.post(f"{url}/v1/completions", json={"model": name, "prompt": TEXT}).json()["error"]
        assert found[name]["state"] == "failed" and found[name]["complaint"].lower() == error["message"].lower()
        assert error["code"] in shown(tab, f"[data-name='{name}'] .complaint small")
    assert found["a0"]["state"] == "done" and found["a0"]["text"]
    # an error on the way: what was written stays
    sent = ['{"id": "x", "choices": [{"text": "begun", "finish_reason": null}]}', '{"error": {"message": "given up", "code": "timeout"}}']
    stream = "".join(f"data: {each}\n\n" for each in sent)
    tab.evaluate(f"(window.fetch = async () => new Response({json.dumps(stream)}), 1)")
    tab.evaluate("document.body.dataset.state = ''")
    tab.click("#send")
    assert {(c["text"], c["complaint"], c["state"]) for c in settled(tab)} == {("begun", "Given up", "failed")}
    tab.evaluate("window.fetch = () => Promise.reject(new TypeError('refused'))")
    tab.evaluate("document.body.dataset.state = ''")
    tab.click("#send")
    assert all("does not answer" in column["complaint"] for column in settled(tab))
    tab.until("document.querySelector('#health').dataset.state === 'down'")


def test_a_hidden_tab_asks_nothing(tab, served):
    url, service = served
    tab.open(url)
    tab.until("document.querySelector('#health').dataset.state === 'live'")
    tab.evaluate("""(Object.defineProperty(document, 'hidden', {get: () => window.away ?? false, configurable: true}), window.away = true,
        window.asked = 0, window.real = window.fetch, window.fetch = (...all) => { window.asked += 1; return window.real(...all); },
        document.dispatchEvent(new Event('visibilitychange')), 1)""")
    assert tab.evaluate("document.querySelector('#health').dataset.state") == "paused"
    tab.evaluate("new Promise((done) => setTimeout(done, 1200))")  # longer than from one question to the next
    assert tab.evaluate("window.asked") == 0
    tab.evaluate("(window.away = false, document.dispatchEvent(new Event('visibilitychange')), 1)")
    tab.until("window.asked > 0 && document.querySelector('#health').dataset.state === 'live'")


def test_what_is_copied_runs(tab, served):
    openai = pytest.importorskip("openai")
    assert openai
    url, service = served
    prompt = "it's \"quoted\" \\ and\n$HOME"
    fields = {"adapters": "a1,tiny", "prompt": prompt, "mode": "completion", "max_tokens": "8", "seed": "4", "run": "1"}
    tab.open(str(httpx.URL(url, params=fields)))
    wanted = settled(tab)[0]["text"]
    tab.evaluate("""(navigator.clipboard.writeText = async (text) => { window.copied = text; }, 1)""")
    buttons = "[...document.querySelector('.column').querySelectorAll('footer button')]"

    def copied(label):
        tab.evaluate(f"(window.copied = null, {buttons}.find((button) => button.textContent === {json.dumps(label)}).click())")
        return tab.until("window.copied")

    assert copied("Copy text") == wanted
    words = shlex.split(copied("curl").replace("\\\n", " "))
    assert words[:2] == ["curl", f"{url}/v1/completions"] and words[2::2] == ["-H", "-d"]
    body = json.loads(words[5])
    assert body["prompt"] == prompt and api(url, "/v1/completions", **body)["choices"][0]["text"] == wanted
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(copied("Python"), {})
    assert printed.getvalue() == wanted + "\n"
    tab.evaluate("(window.copied = null, document.querySelector('#share').click())")
    link = tab.until("window.copied")
    assert dict(httpx.URL(link).params) == fields
    chat = "import('./page/snippets.js').then((made) => made.python('v1/chat/completions', {model: 'a1', messages: []}, true))"
    assert "chat.completions.create" in tab.evaluate(chat) and 'os.environ["GRAFTWORK_API_KEY"]' in tab.evaluate(chat)
    compile(tab.evaluate(chat), "copied", "exec")


def test_a_server_with_keys_asks_for_one(tab, fleet, tmp_path):
    from graftwork.serving.http.keys import read_keys

    keys = read_keys(write_keys(tmp_path / "keys", {"name": "alice", "adapters": ["a0", "a1"]}))
    with listening(make_app(fleet, keys=keys)) as url:
        tab.open(url)
        tab.until("document.querySelector('#health-text').textContent === 'needs a key'")
        assert shown(tab, "#complaint") == "This server needs an API key."
        assert not tab.evaluate("document.querySelector('#key-panel').hidden")
        tab.type("#key", "mallory")
        tab.press("Enter", 13)
        tab.until("document.querySelector('#complaint').textContent === 'This server does not know the API key.'")
        tab.type("#key", "alice")
        tab.press("Enter", 13)
        tab.until("document.querySelector('#health').dataset.state === 'live' && document.querySelectorAll('.column').length === 2")
        assert tab.evaluate("document.querySelector('#key-panel').hidden") and tab.evaluate("localStorage.length") == 0
        assert tab.evaluate("Object.values(sessionStorage)") == ["alice"] and not tab.evaluate("document.cookie")
        assert [column["name"] for column in columns(tab)] == ["a0", "a1"]
        tab.type("#prompt", TEXT)
        tab.type("#max_tokens", "9")
        tab.click("input[value=completion]")
        tab.click("#send")
        for column in settled(tab):
            body = {"model": column["name"], **FIELDS, "max_tokens": 9}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers={"authorization": "Bearer alice"}).json()
            assert column["text"] == answer["choices"][0]["text"]
        tab.click("#key-toggle")
        tab.click("#key-forget")
        tab.until("document.querySelector('#health').dataset.state === 'key'")
        assert tab.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("width", [1280, 800, 360])
def test_nothing_sticks_out_at_any_width(tab, served, width):
    url, _ = served
    tab.view(width, 800)
    names = "a0,tiny,a1,a2,team-0-task-2000"
    tab.open(str(httpx.URL(url, params={"adapters": names, "prompt": "x" * 300, "mode": "completion", "run": 1})))
    settled(tab)
    tab.evaluate("document.querySelector('#search').focus()")
    tab.until("!document.querySelector('#drop').hidden")
    assert "5 are chosen" in shown(tab, "#drop-note")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll("body *")].filter((element) => element.getBoundingClientRect().right > innerWidth + 1
        && !element.closest(".unseen")).map((element) => element.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    tab.view(1280, 900)

