"""Seconds of `graft --help`, median of five runs of the interpreter; the goal is below 0.5 s on a quiet machine."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    command, seconds = [sys.executable, "-m", "graftwork.cli.main", "--help"], []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # bytecode and disk cache
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - start, 4))
    result = {"command": "python -m graftwork.cli.main --help", "seconds": seconds, "median": statistics.median(seconds), "goal": 0.5}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "help_time.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
