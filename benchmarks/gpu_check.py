"""`make gpu-check`: conformance, plan against measured, and the training benchmark on the CUDA device of this machine. Writes
docs/gpu-check.json. Without a device it says so and exits 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def run(*command: str) -> dict:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    return {"command": " ".join(command), "exit": done.returncode, "tail": (done.stdout + done.stderr)[-4000:]}


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch", file=sys.stderr)
        return 1
    checks = {
        "conformance": run("-m", "pytest", "tests/conformance", "-q", "--device", "cuda"),
        "plan against measured": run("benchmarks/plan_accuracy.py", "--device", "cuda"),
        "training": run("benchmarks/lora_training.py", "--rounds", "5"),
    }
    out = ROOT / "docs" / "gpu-check.json"
    out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": checks}, indent=1))
    for name, check in checks.items():
        print(f"{name}: {'passed' if check['exit'] == 0 else 'FAILED'}")
    print(f"written: {out}")
    return 0 if all(c["exit"] == 0 for c in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
