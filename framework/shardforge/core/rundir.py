"""The name of every file inside a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Nothing here creates it; writers do."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: `shardforge train RUN_DIR/recipe.yaml` rebuilds the run."""
        return self.path / "recipe.yaml"

    @property
    def origins(self) -> Path:
        """JSON: field -> file:line:column where its value came from."""
        return self.path / "origins.json"

    @property
    def provenance(self) -> Path:
        """JSON: code version, package versions, data fingerprint, seed, hosts; one entry per start."""
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Held by the first rank of a living run."""
        return self.path / "lock"

    @property
    def stop(self) -> Path:
        """Touch this file to ask a living run to save and stop."""
        return self.path / "STOP"

    @property
    def stopped(self) -> Path:
        """JSON verdict of the last stop: state, step, reason; written after the last save."""
        return self.path / "stopped.json"

    @property
    def failure(self) -> Path:
        """JSON of the first rank that failed in this start."""
        return self.path / "failure.json"

    @property
    def verdict(self) -> Path:
        """One page on the last failure: who waited for whom, on which node, with the stacks of all ranks."""
        return self.path / "verdict.txt"

    @property
    def launch(self) -> Path:
        """What a cluster run has beside: script, submissions, attempts, preflight reports, output of the job."""
        return self.path / "launch"

    @property
    def script(self) -> Path:
        """The batch script that was submitted last."""
        return self.launch / "job.sbatch"

    @property
    def jobs(self) -> Path:
        """JSON lines, one a submission: job id, cluster, nodes, walltime, time."""
        return self.launch / "jobs.jsonl"

    @property
    def attempts(self) -> Path:
        """JSON lines, two an attempt to run it: how it began, and how it ended."""
        return self.launch / "attempts.jsonl"

    @property
    def decision(self) -> Path:
        """One line: what was to be done after the last attempt."""
        return self.launch / "decision"

    @property
    def logs(self) -> Path:
        """What the job and its ranks printed."""
        return self.launch / "logs"

    def occupied(self, start: str) -> Path:
        """JSON: written by a start that was refused because another run lives here; `start`, and `owner` of the run."""
        return self.launch / f"occupied-{start}.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def experts_plot(self) -> Path:
        """Only of a mixture."""
        return self.path / "experts.png"

    @property
    def samples(self) -> Path:
        """Text written by the trained model; the report shows it."""
        return self.path / "samples.txt"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"
