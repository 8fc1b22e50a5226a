from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shardforge.core.rundir import RunDir
from shardforge.launch import preflight, preflight_facts, preflight_wanted
from shardforge.launch.preflight import alone, main, pace
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_desk import Desk
from shardforge.launch.preflight_wanted import Wanted

QUICK = PreflightConfig(share=0.0, patience_s=20.0, free_memory=0, free_disk=0, write_bytes=1000)
START = "7.0.1"


def wish(run: Path, nodes: int = 2, **change: Any) -> Path:
    config = PreflightConfig(**{**vars(QUICK), **change.pop("config", {})})
    preflight_wanted.write(Wanted(nodes=nodes, config=config, **change), RunDir(run))
    return run


@pytest.fixture
def allocation() -> Callable[..., dict[str, int]]:
    """The exit codes of a preflight on nodes, those in `present` of `expected`; the first node decides.

    `elsewhere` are the run directories of nodes that have one of their own.
    """

    def run(
        run_dir: Path, expected: str = "a b c", present: Sequence[str] = (), *more: str, **elsewhere: Path
    ) -> dict[str, int]:
        with closing(Desk("free", [])) as free:
            port = free.port
        codes: dict[str, int] = {}

        def be(node: str) -> None:
            words = [
                "--run",
                str(elsewhere.get(node, run_dir)),
                "--start",
                START,
                "--head",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            codes[node] = main([*words, "--nodes", expected, "--node", node, *more])

        threads = [threading.Thread(target=be, args=(node,)) for node in present or expected.split()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return codes

    return run


def left(run_dir: Path) -> dict[str, str]:
    folder = run_dir / "launch" / "preflight"
    return {path.name.removeprefix(f"{START}."): path.read_text() for path in folder.iterdir()}


def test_good_nodes_are_counted_and_named(allocation, tmp_path, capsys):
    assert allocation(wish(tmp_path)) == {"a": 0, "b": 0, "c": 0}
    files = left(tmp_path)
    assert (files["code"], files["nodes"], files["bad"]) == ("0\n", "a\nb\nc\n", "")
    assert "3 of 3 nodes are good, 2 needed" in capsys.readouterr().out


def test_nothing_but_the_report_is_left(allocation, tmp_path):
    allocation(wish(tmp_path))
    assert set(left(tmp_path)) == {"code", "nodes", "bad", "stop", "json"}


def test_a_node_that_does_not_come_is_named_and_the_others_begin(allocation, tmp_path):
    codes = allocation(wish(tmp_path, config={"patience_s": 2.0}), "a b c", ["a", "c"])
    assert codes == {"a": 0, "c": 0}
    assert left(tmp_path)["bad"] == "b\tdid not come in 2 s\n" and left(tmp_path)["nodes"] == "a\nc\n"


def test_too_few_nodes_are_3(allocation, tmp_path):
    codes = allocation(wish(tmp_path, 3, config={"patience_s": 2.0}), "a b c", ["a", "b"])
    assert codes["a"] == 3 and left(tmp_path)["code"] == "3\n" and left(tmp_path)["nodes"] == "a\nb\n"


def test_a_corpus_that_is_nowhere_is_4_and_said(allocation, tmp_path):
    codes = allocation(wish(tmp_path, data=(str(tmp_path / "corpus"),)))
    files = left(tmp_path)
    assert codes == {"a": 4, "b": 0, "c": 0} and (files["code"], files["bad"]) == ("4\n", "")
    assert files["stop"].startswith(
        f"on 3 of 3 nodes: {tmp_path / 'corpus'}: the folder does not exist. Put the corpus"
    )


def test_a_node_with_another_run_directory_is_named(allocation, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_facts, "SEEN_S", 0.5)
    allocation(wish(tmp_path / "shared"), b=tmp_path / "own")
    assert "is not the one that a writes to" in (told := left(tmp_path / "shared"))["bad"]
    assert told["bad"].startswith("b\t") and told["code"] == "0\n"


def test_a_run_directory_that_each_node_has_for_itself_is_4_and_says_where_to_put_it(allocation, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_facts, "SEEN_S", 0.5)
    codes = allocation(wish(tmp_path / "a"), b=tmp_path / "b", c=tmp_path / "c")
    assert codes["a"] == 4 and left(tmp_path / "a")["bad"] == ""
    assert "Put the run directory on a file system that all nodes share" in left(tmp_path / "a")["stop"]


def test_the_end_of_the_job_is_heeded(allocation, tmp_path):
    codes = allocation(wish(tmp_path, lead_s=60.0), "a b c", (), "--ends-at", "1000.5")
    assert codes["a"] == 3 and left(tmp_path)["bad"] == ""
    assert "are left" in json.loads(left(tmp_path)["json"])["short"]


def test_a_run_directory_that_cannot_be_written_is_no_start(allocation, tmp_path, capsys):
    (wish(tmp_path) / "launch" / "preflight").touch()
    assert allocation(tmp_path)["a"] == 4
    assert "the run directory cannot be written to: " in (told := capsys.readouterr()).out
    assert "the report cannot be written" in told.err


def test_a_disk_without_room_for_one_more_checkpoint_is_said(allocation, tmp_path, monkeypatch):
    newest = tmp_path / "checkpoints" / "step-00000010"
    newest.mkdir(parents=True)
    (newest / "COMMITTED").write_text("{}")
    (newest / "weights").write_bytes(bytes(5000))
    monkeypatch.setattr(preflight_facts, "free_disk", lambda folder: 4000)
    assert allocation(wish(tmp_path))["a"] == 4
    assert "3.91 KiB are free at the run directory, 4.88 KiB are asked" in left(tmp_path)["stop"]


def test_without_what_was_wanted_it_stops(tmp_path, capsys):
    words = ["--run", str(tmp_path), "--start", START, "--head", "127.0.0.1", "--port", "1", "--nodes", "a"]
    assert main([*words, "--node", "a"]) == 4
    assert "preflight.json" in capsys.readouterr().out and left(tmp_path)["code"] == "4\n"


def test_a_taken_port_is_another_try_and_excludes_nobody(tmp_path, capsys):
    with closing(Desk("other", [])) as other:
        words = ["--run", str(wish(tmp_path)), "--start", START, "--head", "127.0.0.1", "--port", str(other.port)]
        assert main([*words, "--nodes", "a,b", "--node", "a"]) == 3
    assert f"port {other.port} cannot be listened on" in capsys.readouterr().out and left(tmp_path)["bad"] == ""


def test_a_node_outside_of_the_allocation_says_who_it_is(tmp_path, capsys):
    words = ["--run", str(tmp_path), "--start", START, "--head", "127.0.0.1", "--port", "1", "--nodes", "a, b"]
    assert main([*words, "--node", "z"]) == preflight.LOST
    assert "this node is z, which is none of a, b" in capsys.readouterr().err


def test_a_node_that_never_finds_the_first_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "FINDING_S", 0.2)
    with closing(Desk("free", [])) as free:
        port = free.port
    words = ["--run", str(tmp_path), "--start", START, "--head", "127.0.0.1", "--port", str(port), "--nodes", "a b"]
    assert main([*words, "--node", "b"]) == preflight.LOST
    assert f"b did not find the first node at 127.0.0.1 port {port}" in capsys.readouterr().err


def test_processes_find_each_other_without_torch(tmp_path):
    with closing(Desk("free", [])) as free:
        port = free.port
    code = "import sys; from shardforge.launch.preflight import main; code = main(sys.argv[1:]); "
    code += "sys.exit(99 if 'torch' in sys.modules else code)"
    words = ["--run", str(wish(tmp_path)), "--start", START, "--head", "localhost", "--port", str(port)]
    started = [
        subprocess.Popen([sys.executable, "-c", code, *words, "--nodes", "a,b", "--node", node]) for node in "ba"
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert left(tmp_path)["nodes"] == "a\nb\n"


def test_this_machine_alone_is_one_node_and_leaves_nothing(tmp_path):
    report = alone(Wanted(nodes=1, config=QUICK), RunDir(tmp_path / "runs" / "new"))
    assert report.verdict.good == (platform.node(),) and not list(tmp_path.iterdir())


def lines(run: RunDir, *events: dict[str, Any], tail: str = "") -> None:
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events) + tail)


def test_pace_is_the_usual_step_and_the_longest_save(tmp_path):
    run = RunDir(tmp_path)
    steps = [
        {
            "event": "step",
            "step": number,
            "seconds": 2.0 + (number == 3) * 50.0,
            "save_seconds": 0.5,
            "time": 10.0 * number,
        }
        for number in range(1, 6)
    ]
    saves = [{"event": "checkpoint", "step": 2, "time": 27.0}, {"event": "checkpoint", "step": 4, "time": 52.5}]
    lines(
        run, {"event": "start"}, *steps, *saves, {"event": "checkpoint", "step": 99, "time": 1e9}, tail='{"event": "st'
    )
    assert pace(run) == (1.5, 12.5)


def test_pace_of_a_run_that_has_not_begun_is_unknown(tmp_path):
    assert pace(RunDir(tmp_path)) == (None, None)


def test_pace_reads_the_end_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "TAIL", 200)
    run = RunDir(tmp_path)
    lines(run, *({"event": "step", "step": step, "seconds": float(step), "time": 0.0} for step in range(1, 101)))
    assert 97.0 < (pace(run)[0] or 0.0) <= 100.0
