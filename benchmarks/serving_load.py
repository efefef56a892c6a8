"""Does `graft serve` stand five hundred streaming clients for two minutes, without a lost or wrong answer?

    OMP_NUM_THREADS=1 python benchmarks/serving_load.py [--clients 500] [--seconds 120]

A tiny random Llama (tests/tiny.py) and a dozen adapters of as many methods in a pool that cannot hold all that is asked at once. Before
the server starts, the prompts are answered under each adapter alone, by Transformers' cache path and greedily; every streamed answer
is compared with that, token for token. Meanwhile half of the clients go away in the middle of each of their answers, one adapter is
replaced by another content and back all the time, one is unloaded and loaded again, and one is broken. At the end nothing may be
running, waiting, or left in the pool. Server and clients share the machine with whatever else runs on it ("load of the machine
before"), so the times are those of an overloaded server and no measure of its speed.

Writes benchmarks/results/serving_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]
OUT = ROOT / "benchmarks" / "results" / "serving_load.json"

import torch
from crowd import Answer, Ask, Tally, call, crowd, in_turn, metrics
from serve_process import Server

import graftwork
import tiny
from graftwork.serving.generate import generate

#: name -> method and its options
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora4": ("lora", {"r": 4}), "lora9": ("lora", {"r": 9, "target_modules": "all-linear"}), "paca": ("paca", {"r": 3}),
    "flora": ("flora", {"r": 2}), "nola": ("nola", {"r": 2, "n_basis": 16}), "vera": ("vera", {"r": 8}), "dora": ("dora", {"r": 4}),
    "ia3": ("ia3", {}), "loha": ("loha", {"r": 2}), "s2ft": ("s2ft", {"ratio": 0.3, "per_layer": True, "target_modules": "all-linear"}),
    "prompt": ("prompt", {"num_virtual_tokens": 3}), "prefix": ("prefix", {"num_virtual_tokens": 3})}
#: what the name "swap" stands for in turn, and what "comes" stands for while it is there
SPARE: dict[str, tuple[str, dict[str, Any]]] = {
    "spare1": ("lora", {"r": 5}), "spare2": ("paca", {"r": 6}), "spare3": ("lora", {"r": 3})}
BROKEN = "broken"
PROMPTS = ("the user and one more of these", "in the note: a list", "the user and one more of these notes is in the list",
           "on and on, one and all, then the rest and the end of it")
SHORTEST, LONGEST = 4, 24
#: the two likeliest tokens must be further apart than this, or another order of sums could choose the other one
GAP = 1e-3
POOL = "3MiB"


class Fleet:
    """The folder of a tiny base and its adapters, and what each answers alone. prompts: how many of PROMPTS."""

    def __init__(self, folder: Path, prompts: int = len(PROMPTS)):
        self.model, self.tokenizer = tiny.llama(tied=False), tiny.tokenizer()
        self.base, self.adapters, self.spare = folder / "tiny", folder / "fleet", folder / "spare"
        self.prompts = list(PROMPTS[:prompts])
        tiny.save(self.model, self.base)
        for where, described in ((self.adapters, ADAPTERS), (self.spare, SPARE)):
            for seed, (name, (method, options)) in enumerate(described.items()):
                graft = graftwork.attach(self.model, method, name="one", seed=seed, **options)
                _stir(graft, seed)
                graft.save(where / name)
                graft.detach()
        self._break()
        self.known = {key: ids for name in ("tiny", *ADAPTERS, *SPARE) for key, ids in self._alone(name).items()}

    def _break(self) -> None:
        """One byte of a tensor is another one than the card says."""
        graft = graftwork.attach(self.model, "lora", name="one", r=4)
        graft.save(self.adapters / BROKEN)
        graft.detach()
        file = next((self.adapters / BROKEN).glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-5] ^= 255
        file.write_bytes(content)

    def _alone(self, name: str) -> dict[tuple[str, str], tuple[int, ...]]:
        """Tokens of the greedy answer to each prompt, as far as they are beyond doubt."""
        graft = None if name == "tiny" else graftwork.attach_saved(
            self.model, (self.adapters if name in ADAPTERS else self.spare) / name, name="one")
        made = generate(self.model, self.tokenizer, self.prompts, adapters=[None if graft is None else "one"] * len(self.prompts),
                        max_new_tokens=LONGEST, gaps=True)
        if graft is not None:
            graft.detach()
        sure = [next((i for i, gap in enumerate(answer.gaps) if gap < GAP), len(answer.gaps)) for answer in made]
        return {(name, prompt): answer.ids[:tokens] for prompt, answer, tokens in zip(self.prompts, made, sure)}

    def answer(self, name: str, prompt: str, tokens: int) -> Answer:
        ids = list(self.known[name, prompt][:tokens])
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                      tuple(self.tokenizer.decode([token]) for token in ids))

    def ask(self, draw: random.Random, models: Sequence[str] = ("tiny", *ADAPTERS, "swap", "comes", BROKEN), longest: int = LONGEST) -> Ask:
        """One of these models, one prompt, some number of tokens."""
        name = draw.choice(models)
        contents = {"swap": ("spare1", "spare2"), "comes": ("spare3",), BROKEN: ()}.get(name, (name,))
        sure = {prompt: min((len(self.known[content, prompt]) for content in contents), default=LONGEST) for prompt in self.prompts}
        prompt = draw.choice([prompt for prompt, tokens in sure.items() if tokens >= SHORTEST])
        count = draw.randint(SHORTEST, min(sure[prompt], longest))
        body = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "logprobs": 0, "ignore_eos": True}
        refusals = {"comes": {(404, "model_not_found")}, BROKEN: {(400, "adapter_unusable")}}.get(name, set())
        return Ask(body, tuple(self.answer(content, prompt, count) for content in contents), frozenset(refusals))

    def options(self, *more: str, pool: str = POOL, port: int = 0) -> list[str]:
        """Of `graft serve`."""
        return ["--model", str(self.base), "--adapters", str(self.adapters), "--allow-load", "--allow-path", str(self.spare),
                "--pool", pool, "--max-running", "128", "--port", str(port), *more]

    def load(self, name: str, spare: str, **fields: Any) -> tuple[str, Any]:
        """The call that makes a name stand for one of the spare adapters."""
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.spare / spare), **fields}

    async def run(self, server: Server, *, clients: int, seconds: float, tally: Tally) -> dict[str, Any]:
        """The load; figures of the server's memory and of what was changed meanwhile."""
        for each in (self.load("swap", "spare1"), self.load("comes", "spare3")):
            status, content = await call(server.url, *each)
            assert status == 200, content
        # warm: every adapter once, and as many connections as there will be
        warm = await crowd(server.url, lambda draw: self.ask(draw, longest=SHORTEST), clients=clients, seconds=1.0, seed=1)
        tally.wrong += warm.wrong
        await idle(server.url)
        start, cpu, clock = server.rss, server.cpu, time.perf_counter()
        changes = [self.load("swap", "spare2", load_inplace=True), ("/v1/unload_lora_adapter", {"lora_name": "comes"}),
                   self.load("swap", "spare1", load_inplace=True), self.load("comes", "spare3")]
        _, changed = await asyncio.gather(
            crowd(server.url, self.ask, clients=clients, seconds=seconds, tally=tally),
            in_turn(server.url, changes, seconds=seconds, pause=0.2, tally=tally))
        left = await idle(server.url)
        return {"seconds": time.perf_counter() - clock, "cpu": server.cpu - cpu, "changes of adapters": changed, "rss at start": start,
                "rss at end": server.rss, "metrics at end": left}


async def idle(url: str) -> dict[str, float]:
    """The metrics once nothing runs and nothing waits."""
    for _ in range(600):
        found = await metrics(url)
        if not (found["graftwork_requests_running"] or found["graftwork_requests_waiting"]):
            return found
        await asyncio.sleep(0.1)
    raise RuntimeError(f"requests that nobody waits for are still there: {found}")


def _stir(graft: Any, seed: int) -> None:
    """So far from the identity that no two adapters answer alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = statistics.quantiles(seconds, n=20)
    return {"p50": round(1000 * cuts[9], 1), "p95": round(1000 * cuts[18], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tally, load = Tally(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder))
        with Server(fleet.options(), Path(folder) / "log") as server:
            found = asyncio.run(fleet.run(server, clients=asked.clients, seconds=asked.seconds, tally=tally))
    end = found["metrics at end"]
    held = end["graftwork_pool_pages_used"] - end["graftwork_pool_pages_idle"]
    row = {
        "processors": os.cpu_count(), "load of the machine before": round(load, 1), "clients": asked.clients, "seconds": asked.seconds,
        "seconds until all had their last answer": round(found["seconds"]), "most clients that waited at once": tally.most,
        "requests": tally.whole + tally.left + tally.refused.total() + len(tally.wrong), "whole answers": tally.whole,
        "went away": tally.left, "refused as they should": {f"{s} {c}": n for (s, c), n in sorted(tally.refused.items())},
        "429": tally.busy, "errors": len(tally.wrong), "pages held at the end": held, "changes of adapters": found["changes of adapters"],
        "tokens": tally.tokens, "tokens/s": round(tally.tokens / found["seconds"], 1), "server's processor seconds": round(found["cpu"], 1),
        "tokens per processor second": round(tally.tokens / found["cpu"]), "time to first token, ms": _quantiles(tally.first),
        "time per token, ms": _quantiles(tally.gaps), "adapter loads": end["graftwork_adapter_loads"],
        "rss at start, MB": round(found["rss at start"] / 1e6), "rss at end, MB": round(found["rss at end"] / 1e6)}
    print(json.dumps(row, indent=1))
    for text in tally.wrong[:5]:
        print(text, file=sys.stderr)
    OUT.write_text(json.dumps(row, indent=1) + "\n")
    if tally.wrong or held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
