"""A conversion holds less than two of the largest tensors, however large the model: it works where more is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shardforge.bench import upcycle

ROOT = Path(__file__).resolve().parents[3]
CONSTANT = 96 << 20
"""Stacks of threads, headers, journals, and what the allocator keeps."""

LIMITED = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from shardforge.convert.format import Options
    from shardforge.convert.run import convert

    def of(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    source, small, root = map(Path, sys.argv[1:4])
    limit, proof = int(sys.argv[4]), sys.argv[5]
    for to, back in (("shardforge", "huggingface"),):  # what is imported on the way
        convert(small, root / "warm", Options(to=to), processes=1, proof=proof)
        convert(root / "warm", root / "warm back", Options(to=back), processes=1, proof=proof)
    whole = limit if limit > 1 << 30 else of("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (whole, whole))
    size = sum(file.stat().st_size for file in source.iterdir())
    assert size > whole, (size, whole)
    convert(source, root / "ours", Options(to="shardforge"), processes=1, proof=proof)
    if size > 1 << 32:
        (source / "model.safetensors").unlink()  # the disk need not hold it three times
    convert(root / "ours", root / "back", Options(to="huggingface", dtype="bf16"), processes=1, proof=proof)
    """
)


SMALL = upcycle.Size(layers=16, hidden=1024, inner=2816, experts=1, dtype="fp32")
"""11 MiB in the largest tensor; 0.7 GB in all is more than the program takes by itself."""
LARGE = upcycle.Size(layers=20, hidden=4096, inner=11008, experts=1, dtype="bf16")
CASES = {
    "0.7 GB": (SMALL, 2 * 4 * SMALL.hidden * SMALL.inner + CONSTANT, "none"),
    "8 GB under 2 GB": (LARGE, 2 << 30, "own"),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", ["0.7 GB", pytest.param("8 GB under 2 GB", marks=pytest.mark.large)])
def test_it_needs_less_than_two_of_the_largest_tensors_and_a_constant(tmp_path, case):
    size, limit, proof = CASES[case]
    upcycle.write_source(tmp_path / "large", size)
    upcycle.write_source(tmp_path / "small", upcycle.Size(1, 128, 128, 1, size.dtype))
    paths = [str(tmp_path / name) for name in ("large", "small", "made")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, *paths, str(limit), proof]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
