"""What this start of a run is: the job and the restart of a scheduler, and why the life before it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardforge.core.rundir import RunDir

LONGEST = 300
"""Letters of a reason."""


def facts(run_dir: RunDir, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Plain data: start, job, restart, nodes and reason, as far as they are known. Read before a start forgets how the
    one before it ended.

    A launcher tells the reason in SHARDFORGE_REASON. Without one it is what the earlier life left in its files.
    """
    found: dict[str, Any] = {"start": environment.get("SHARDFORGE_START", ""), "job": job(environment)}
    if found["job"]:
        found["restart"] = int(environment.get("SLURM_RESTART_COUNT") or 0)
        found["nodes"] = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found["reason"] = environment.get("SHARDFORGE_REASON") or earlier(run_dir)
    return {name: value for name, value in found.items() if value not in ("", None)}


def job(environment: Mapping[str, str]) -> str:
    """As Slurm's commands take it: "123", or "120_3" of an array."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def earlier(run_dir: RunDir) -> str:
    """Why the last life in a directory ended; "" where there was none."""
    stopped, failed = _object(run_dir.stopped), _object(run_dir.failure)
    if stopped is not None:
        return str(stopped.get("reason") or stopped.get("state", ""))
    if failed is not None:
        message = str(failed.get("message", "")).strip()
        return f"{failed.get('cause', 'failed')}: {message.partition(chr(10))[0]}"[:LONGEST]
    return "it ended without a word" if run_dir.metrics.exists() else ""


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
