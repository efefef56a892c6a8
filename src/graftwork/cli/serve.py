"""`graft serve`: an OpenAI-compatible server for a base and a folder of adapters."""

from __future__ import annotations

from typing import Any

import typer

EPILOG = ("Examples: graft serve --model smollm2-135m-instruct --adapters runs --port 8000 | graft serve --model ./llama --adapters fleet "
          "--storage nf4 --pool 4GiB --api-keys keys.jsonl --allow-load | then, with the openai client: "
          "OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none').chat.completions.create(model='NAME_OF_A_SUBFOLDER', ...)")

#: import names of the extra `serve`
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def run(
    model: str = typer.Option(..., "--model", help="Packaged name, folder, .gguf file or Hub id of the base."),
    adapters: str = typer.Option(None, "--adapters", help="Folder with one saved adapter (ours or PEFT's) a subfolder; its name is the "
                                                          "`model` of requests."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; 0.0.0.0 is every network of this machine."),
    port: int = typer.Option(8000, "--port", help="0 takes a free one (it is printed)."),
    name: str = typer.Option(None, "--name", help="The base's name for clients (default: the last part of --model)."),
    storage: str = typer.Option(None, "--storage", help="dense, nf4, ... (default: dense)."),
    dtype: str = typer.Option(None, "--dtype", help="bf16, fp32 (default: the checkpoint's)."),
    pool: str = typer.Option("1GiB", "--pool", help="Memory of keys, values and adapters in use, like 512MiB or 2GiB."),
    host_memory: str = typer.Option("1GiB", "--host-memory", help="Memory of adapters that were read and are not in use."),
    policy: str = typer.Option("fcfs", "--policy", help="Order of waiting requests: fcfs, clustered, early_abort, fair."),
    max_running: int = typer.Option(64, "--max-running", help="Requests in one batch."),
    chunk: int = typer.Option(512, "--chunk", help="Tokens of one prompt in a step."),
    max_queue: int = typer.Option(1024, "--max-queue", help="Requests that wait; more get 429."),
    max_prompt: int = typer.Option(None, "--max-prompt", help="Longest prompt, in tokens (default: the model's context)."),
    max_body: str = typer.Option("4MiB", "--max-body", help="Largest request."),
    timeout: float = typer.Option(600.0, "--timeout", help="Seconds that a request may take."),
    deadline: float = typer.Option(None, "--deadline", help="Seconds to the first token, for --policy early_abort."),
    drain: float = typer.Option(30.0, "--drain", help="Seconds that SIGTERM leaves to answers that are being written."),
    chat_tokens: int = typer.Option(512, "--chat-tokens", help="Tokens of a chat answer whose request names no limit."),
    api_keys: str = typer.Option(None, "--api-keys", help="File with one JSON object a line: name, sha256, adapters, "
                                                          "requests_per_minute, manage (default: no keys)."),
    allow_load: bool = typer.Option(False, "--allow-load", help="Clients may load and unload adapters."),
    allow_path: list[str] = typer.Option([], "--allow-path", help="Folder beside --adapters to load from; repeatable."),
    allow_source: list[str] = typer.Option([], "--allow-source", help="URL below which adapters may be read, like s3://bucket/adapters; "
                                                                      "repeatable (default: no URL is ever opened)."),
    disk_cache: str = typer.Option(None, "--disk-cache", help="Disk that adapters from URLs may take in the cache (default: 20GiB)."),
    prefix_cache: bool = typer.Option(True, "--prefix-cache/--no-prefix-cache", help="Compute beginnings that prompts share once."),
    replicas: int = typer.Option(1, "--replicas", help="Servers behind one address, each with a pool of its own (needs ray); an adapter's "
                                                       "requests go to the same one."),
    count_requests: bool = typer.Option(True, "--count-requests/--no-count-requests", hidden=True),  # a router counts them
    page: bool = typer.Option(True, "--page/--no-page", help="A page at / to compare adapters and watch the engine."),
    merge: bool = typer.Option(False, "--merge/--no-merge", help="Merge an adapter that most requests ask for into a copy of the weights "
                                                                 "while they do; needs a dense base, and memory for the copy."),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings and errors only."),
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API does (/v1/completions, /v1/chat/completions)."""
    given = dict(locals())
    import importlib.util
    import logging
    import sys
    from pathlib import Path

    from ..errors import UsageError

    missing = [each for each in NEEDED if importlib.util.find_spec(each) is None]
    if missing:
        raise UsageError(f"the server needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
                         remedy="pip install 'graftwork[serve]'")
    if replicas > 1 and not all(importlib.util.find_spec(each) for each in ("ray", "httpx")):
        raise UsageError(f"{replicas} replicas need ray, which is not installed", remedy="pip install 'graftwork[ray]', or --replicas 1")
    if policy == "early_abort" and deadline is None:
        raise UsageError("--policy early_abort gives up requests by their deadline, and none is named", remedy="add --deadline 10")
    if deadline is not None and policy != "early_abort":
        raise UsageError(f"--deadline says nothing to --policy {policy}", remedy="use --policy early_abort, or leave it out")
    if policy == "fair" and api_keys is None:
        raise UsageError("--policy fair shares the server among API keys, and there are none", remedy="add --api-keys FILE")
    if (allow_load or allow_path) and adapters is None:
        raise UsageError("adapters cannot be loaded without a folder of adapters", remedy="add --adapters FOLDER; it may be empty")
    if allow_source and adapters is None:
        raise UsageError("adapters from URLs need a folder whose book names them", remedy="add --adapters FOLDER; it may be empty")
    if disk_cache is not None and not allow_source:
        raise UsageError("--disk-cache says nothing without --allow-source", remedy="add --allow-source URL, or leave it out")
    if allow_path and not allow_load:
        raise UsageError("--allow-path says nothing without --allow-load", remedy="add --allow-load, or leave it out")
    if merge and storage not in (None, "dense", "none"):
        raise UsageError(f"--merge needs a dense base, and --storage says {storage}", remedy="leave one of the two out")
    for option, value in (("--max-running", max_running), ("--chunk", chunk), ("--max-queue", max_queue), ("--chat-tokens", chat_tokens),
                          ("--max-prompt", max_prompt), ("--timeout", timeout), ("--deadline", deadline), ("--replicas", replicas)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} is {value}, it must be above 0", remedy="correct it")

    from ..planning.measure import format_bytes, parse_bytes
    from ..serving.http.keys import read_keys
    from ..serving.http.server import bind, log_to_stderr
    from ..serving.http.server import run as serve
    from ..serving.sources import Sources

    sizes = {option: parse_bytes(text) for option, text in (("pool", pool), ("host", host_memory), ("body", max_body),
                                                                 ("disk", disk_cache or "20GiB"))}
    for folder in (adapters, *allow_path):
        if folder is not None and not Path(folder).is_dir():
            raise UsageError(f"there is no folder {folder}", remedy="name a folder whose subfolders are saved adapters")
    keys = None if api_keys is None else read_keys(api_keys)
    sources = Sources(allow_source, disk_bytes=sizes["disk"], largest=sizes["host"]) if allow_source else None
    listening = bind(host, port)  # before the model is read: a port that is taken is known at once
    try:
        if replicas > 1:
            return _behind_a_router(given, listening, keys, sizes["body"])
        for key in keys.keys if keys and not count_requests else ():
            key.requests_per_minute = None
        from ..api import load
        from ..serving.engine import Engine, Limits
        from ..serving.http.adapters import Catalog
        from ..serving.http.app import ServerOptions, create_app

        def say(text: str) -> None:
            if not quiet:
                print(text, file=sys.stderr, flush=True)

        base, tokenizer = load(model, storage=storage, dtype=dtype)
        if tokenizer is None:
            raise UsageError(f"{model} has no tokenizer", remedy="add the tokenizer files to the model folder")
        named = name or Path(model.rstrip("/")).name.removesuffix(".gguf") or "base"
        catalog = None if adapters is None else Catalog(base, adapters, base=named, roots=allow_path, host_bytes=sizes["host"],
                                                        sources=sources)
        engine = Engine(base, tokenizer, pool_bytes=sizes["pool"], adapters=catalog, policy=policy, prefix_cache=prefix_cache, merge=merge,
                        limits=Limits(max_running=max_running, chunk=chunk))
        app = create_app(engine, ServerOptions(
            model=named, allow_load=allow_load, max_body=sizes["body"], max_prompt=max_prompt, max_queue=max_queue, max_seconds=timeout,
            chat_tokens=chat_tokens, deadline=deadline, drain=drain, page=page), catalog=catalog, keys=keys)
        log_to_stderr(logging.WARNING if quiet else logging.INFO)
        count = 0 if catalog is None else len(catalog.names())
        say(f"base {named}, {count} adapters, pool {format_bytes(engine.pool.nbytes)} ({engine.pool.pages} pages of "
            f"{engine.pool.page_tokens} tokens), keys: {'none' if keys is None else len(keys.keys)}")
        serve(app, listening, drain=drain, ready=lambda: say(f"listening on {_address(host, listening)}"))
        say("stopped")
    finally:
        listening.close()


def _behind_a_router(given: dict[str, Any], listening: Any, keys: Any, max_body: int) -> None:
    """The same command once for each replica, and one router before them."""
    import logging
    import sys
    from pathlib import Path

    from ..serving.http.app import ServerOptions
    from ..serving.http.fleet import Fleet, serve_replicas
    from ..serving.http.router import Router
    from ..serving.http.server import log_to_stderr

    def say(text: str) -> None:
        if not given["quiet"]:
            print(text, file=sys.stderr, flush=True)

    log_to_stderr(logging.WARNING if given["quiet"] else logging.INFO)
    fleet = Fleet(given["replicas"], run, {**given, "replicas": 1, "count_requests": False, "quiet": True}, drain=given["drain"])
    named = given["name"] or Path(given["model"].rstrip("/")).name.removesuffix(".gguf") or "base"
    options = ServerOptions(named, max_body=max_body, drain=given["drain"])
    router = Router(fleet.replicas, options, full=given["max_running"], keys=keys)
    address = _address(given["host"], listening)
    serve_replicas(fleet, router, listening, ready=lambda: say(f"{given['replicas']} replicas, listening on {address}"))
    say("stopped")


def _address(host: str, listening: Any) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
