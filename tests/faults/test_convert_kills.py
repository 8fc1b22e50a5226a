"""A conversion that is killed never leaves a target that looks whole, and the same call goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.unit.upcycle import dense

ROOT = Path(__file__).resolve().parents[2]

KILLED = textwrap.dedent(
    """
    import os, random, shutil, signal, sys
    from pathlib import Path
    from shardforge.checkpoint import tensorfile
    from shardforge.convert.format import Options
    from shardforge.convert.run import convert
    from tests.unit.convert.folders import contents

    EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir"}
    source, root, to, times = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.fsync = lambda handle: None  # a killed process loses nothing that it has written
    state = {"place": None, "count": 0, "end": None}

    def step():
        state["count"] += 1
        if state["count"] == state["end"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if state["place"] and event in EVENTS and (isinstance(args[0], int) or state["place"] in str(args[0])):
            step()

    def put(file, block):  # half of a block is written when the process dies
        real(file, block[: len(block) // 2])
        step()
        real(file, block[len(block) // 2 :])

    real, tensorfile.put = tensorfile.put, put
    sys.addaudithook(watch)

    def run(place, end):
        state.update(place=str(place), count=0, end=end)
        try:
            return convert(source, place / "made", Options(to=to, shard_bytes=4000), processes=1, proof="none")
        finally:
            state["place"] = None

    def killed(place, end):
        child = os.fork()
        if child == 0:
            try:
                run(place, end)
            finally:
                os._exit(0)
        return os.waitpid(child, 0)[1] == signal.SIGKILL

    place = root / "place"  # recipe.yaml names it
    place.mkdir()
    expected = contents(run(place, None).path)
    total, chance, seen = state["count"], random.Random(5), set()
    assert total > times, total
    for end in sorted({1, 2, *range(total - 12, total + 1), *chance.sample(range(3, total - 12), times - 15)}):
        shutil.rmtree(place)
        place.mkdir()
        assert killed(place, end), end
        again = chance.randrange(1, total)
        if not (place / "made").exists():
            killed(place, again)  # once more, on the way that is left
        if (place / "made").exists():
            assert contents(place / "made") == expected, end
            seen.add("whole")
        else:
            assert {path.name for path in place.iterdir()} <= {".made.partial"}, end
            seen.add("absent")
        run(place, None)
        assert contents(place / "made") == expected, end
        assert [path.name for path in place.iterdir()] == ["made"], end
    print(total, sorted(seen))
    """
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dense.save(tmp_path_factory.mktemp("run") / "run", trained=True)


@pytest.fixture(scope="module", params=[("huggingface", 50), ("shardforge", 25)], ids=lambda each: each[0])
def killed(request, source, tmp_path_factory):
    """What the script said, and the source before it."""
    to, times = request.param
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.rglob("*")}
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path_factory.mktemp("killed")), to, str(times)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env), before


def test_killed_at_any_moment_it_is_absent_or_whole_and_goes_on(killed):
    said, _ = killed
    assert said.returncode == 0, said.stderr
    assert "['absent', 'whole']" in said.stdout


def test_the_source_is_never_written_to(killed, source):
    _, before = killed
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.rglob("*")} == before
