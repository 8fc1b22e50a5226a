"""The first run from raw text to samples, with a stop in the middle: what `make pretrain` does.

Every step is a command that you could have typed; each is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from shardforge.recipe.load import load

RECIPE = "first"
RUN = Path("runs") / RECIPE


def command(*words: str) -> list[str]:
    print(f"\n$ shardforge {shlex.join(words)}", flush=True)
    return [sys.executable, "-m", "shardforge", *words]


def run(*words: str) -> None:
    code = subprocess.run(command(*words)).returncode
    if code:
        sys.exit(code)


def steps_done() -> int:
    """Steps that metrics.jsonl tells of so far."""
    path = RUN / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = [line for line in path.read_text().splitlines() if '"event": "step"' in line]
    return json.loads(lines[-1])["step"] if lines else 0


def train_until(step: int) -> None:
    """Start the run and ask it to stop, as a scheduler would, once `step` steps are done."""
    process = subprocess.Popen(command("train", RECIPE))
    try:
        while process.poll() is None and steps_done() < step:
            time.sleep(0.5)
    except KeyboardInterrupt:  # the terminal has told the run too: it saves, then leaves
        process.wait()
        sys.exit(130)
    if process.poll() is None:
        print(f"\nstep {steps_done()}: asking the run to stop (SIGTERM)", flush=True)
        process.send_signal(signal.SIGTERM)
    if process.wait():
        sys.exit(process.returncode)


def main() -> None:
    begun = time.monotonic()
    half = load(RECIPE).recipe.train.steps // 2
    run("data", "build", RECIPE)
    if steps_done() < half:
        train_until(half)
    run("train", RECIPE)
    run("eval", str(RUN))
    run("sample", str(RUN), "--save")
    run("report", str(RUN))
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes. The run is in {RUN}/: report.html, loss.png, samples.txt,")
    print("metrics.jsonl, recipe.yaml, checkpoints/. Open report.html in a browser.")


if __name__ == "__main__":
    main()
