"""Seconds until `graft serve` answers with 10,000 adapters in its folder, and with one; the goal is below 10 s.

The folder holds one LoRA of the packaged base, saved once and hard-linked: names, inodes of folders and headers are there as for
10,000 adapters, the bytes of the tensors once. Measured from the start of the process: the line that says it listens, the answer
of /v1/models, and the first answer of one of them; `cpu` beside each is the process's own time, which other work on the machine
leaves alone. `catalog` is the index alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

MODEL = "smollm2-135m-instruct"


def save_one(folder: Path) -> None:
    """This also leaves the base's fingerprint in the cache, as every earlier start would."""
    import torch

    import graftwork

    model, _ = graftwork.load(MODEL)
    graft = graftwork.attach(model, "lora", r=8, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.02)
    graft.save(folder)
    graft.detach()


def copies(one: Path, root: Path, count: int) -> None:
    for i in range(count):
        (root / f"a{i}").mkdir(parents=True)
        for file in one.iterdir():
            os.link(file, root / f"a{i}" / file.name)


def catalog_seconds(root: Path) -> dict[str, float]:
    import torch

    from graftwork.serving.http.adapters import Catalog

    start, cpu = time.perf_counter(), time.process_time()
    catalog = Catalog(torch.nn.Linear(1, 1), root, base="base")
    names = catalog.names()
    listed, listed_cpu = time.perf_counter(), time.process_time()
    for name in names:
        catalog.target(name)
    return {"names": round(listed - start, 4), "names_cpu": round(listed_cpu - cpu, 4),
            "each_lookup_cpu": round((time.process_time() - listed_cpu) / len(names), 6), "files_read": catalog.reads}


def server_seconds(root: Path, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "graftwork.cli.main", "serve", "--model", MODEL, "--adapters", str(root), "--port", "0",
               "--pool", "256MiB"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seconds = {}

    def mark(what: str) -> None:
        seconds[what] = round(time.perf_counter() - start, 2)
        times = Path(f"/proc/{process.pid}/stat")
        if times.exists():
            user, system = times.read_text().rsplit(")", 1)[1].split()[11:13]
            seconds[f"{what}_cpu"] = round((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), 2)

    try:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\S+", line)) and "listening" in line)
        mark("listening")
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            models = len(json.load(answer)["data"])
        mark("models")
        body = {"model": name, "prompt": "3 May", "max_tokens": 1}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            json.load(answer)
        mark("first_answer")
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()
    return {**seconds, "models_listed": models}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=10_000)
    count = parser.parse_args().adapters
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        save_one(one)
        copies(one, Path(folder) / "single", 1)
        copies(one, Path(folder) / "fleet", count)
        result = {"adapters": count, "load_average": round(os.getloadavg()[0], 1), "goal_seconds": 10,
                  "catalog": catalog_seconds(Path(folder) / "fleet"),
                  "server_with_one": server_seconds(Path(folder) / "single", "a0"),
                  "server": server_seconds(Path(folder) / "fleet", f"a{count // 2}")}
    path = Path(__file__).parent / "results" / "serving_start.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
