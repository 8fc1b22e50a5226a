from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from shardforge.launch.preflight_checks import ENOUGH, FEW, STOP, Clock, Finding, Verdict, judge
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_facts import Facts, Gpu
from shardforge.launch.preflight_wanted import Wanted

GB = 1_000_000_000
NODES = [f"node{number:02d}" for number in range(64)]
GPUS = tuple(Gpu(index=index, name="H", used=4 * 2**20, ecc=0) for index in range(8))
GOOD = Facts(
    host="h",
    gpus=GPUS,
    versions={"driver": "550", "NCCL": "2.27.3", "python": "3.11", "torch": "2.13"},
    free_memory=900 * GB,
    free_disk=9000 * GB,
    write_bytes_s=2e9,
    filesystem="lustre",
    data={"/data/web": "aa", "/data/code": "bb"},
)
WANTED = Wanted(
    nodes=62,
    gpus=8,
    data=("/data/web", "/data/code"),
    checkpoint_every=100,
    lead_s=120.0,
    config=PreflightConfig(free_memory=500 * GB, free_disk=100 * GB, write_mb_s=500.0),
)


def gpu(index: int, **change: int) -> tuple[Gpu, ...]:
    return (*GPUS[:index], dataclasses.replace(GPUS[index], **change), *GPUS[index + 1 :])


BAD: dict[str, tuple[dict[str, object], str]] = {
    "a GPU is missing": ({"gpus": GPUS[:7]}, "7 GPUs are there, 8 are asked"),
    "no nvidia-smi": ({"gpus": (), "gpu_error": "nvidia-smi did not answer in 20 s"}, "did not answer in 20 s"),
    "a GPU is taken": ({"gpus": gpu(3, used=40 * GB)}, "GPU 3 is not idle: 37.3 GiB of its memory are taken"),
    "a GPU has memory errors": ({"gpus": gpu(5, ecc=2)}, "GPU 5 had 2 uncorrected memory errors"),
    "another driver": ({"versions": {**GOOD.versions, "driver": "535"}}, "driver 535, 550 on the others"),
    "another NCCL": ({"versions": {**GOOD.versions, "NCCL": "2.21.5"}}, "NCCL 2.21.5, 2.27.3 on the others"),
    "no torch": ({"versions": {**GOOD.versions, "torch": "not installed"}}, "torch not installed, 2.13 on the others"),
    "clock ahead": ({"clock_s": 30.0}, "its clock is 30 s ahead of the others, 5 s are allowed"),
    "clock behind": ({"clock_s": -3600.0}, "its clock is 1h00m behind the others"),
    "memory": ({"free_memory": 100 * GB}, "93.1 GiB of memory are free, 466 GiB are asked"),
    "disk": ({"free_disk": 3 * GB}, "2.79 GiB are free at the run directory, 93.1 GiB are asked"),
    "slow disk": ({"write_bytes_s": 3e6}, "writes 3 MB/s to the run directory, 500 are asked"),
    "read-only": ({"write_error": "Read-only file system"}, "cannot be written to: Read-only file system"),
    "not mounted": ({"token": False, "filesystem": "ext4"}, "the run directory (ext4) is not the one that node"),
    "no corpus": (
        {"data": {"/data/web": "aa"}, "data_errors": {"/data/code": "the folder does not exist"}},
        "/data/code: the folder does not exist",
    ),
    "another corpus": ({"data": {"/data/web": "aa", "/data/code": "cc"}}, "/data/code has the fingerprint cc, bb on"),
}


def verdict(change: Callable[[str], dict[str, object]], wanted: Wanted = WANTED, **more: object) -> Verdict:
    facts = {node: dataclasses.replace(GOOD, **change(node)) for node in NODES}  # type: ignore[arg-type]
    return judge(wanted, NODES, facts, **more)  # type: ignore[arg-type]


def test_64_good_nodes_are_good():
    assert verdict(lambda node: {}) == Verdict(ENOUGH, tuple(NODES), {})


@pytest.mark.parametrize("what", BAD)
def test_of_64_nodes_exactly_the_bad_one_is_named(what):
    sick = random.Random(what).choice(NODES[1:])
    change, reason = BAD[what]
    found = verdict(lambda node: change if node == sick else {})
    assert (found.code, found.stop, list(found.bad)) == (ENOUGH, (), [sick])
    assert found.good == tuple(node for node in NODES if node != sick)
    assert len(found.bad[sick]) == 1 and reason in found.bad[sick][0]


def test_all_sicknesses_at_once_each_have_a_node():
    sick = dict(zip(random.Random(0).sample(NODES[1:], len(BAD)), BAD, strict=True))
    found = verdict(lambda node: BAD[sick[node]][0] if node in sick else {}, dataclasses.replace(WANTED, nodes=40))
    assert (found.code, set(found.bad)) == (ENOUGH, set(sick))
    assert all(BAD[what][1] in found.bad[node][0] for node, what in sick.items())


@pytest.mark.parametrize("what", [name for name in BAD if name not in ("another driver", "another NCCL", "no torch")])
def test_what_is_wrong_on_every_node_is_nobodys_fault(what):
    change, reason = BAD[what]
    found = verdict(lambda node: {} if node == NODES[0] and what == "not mounted" else change)
    if what in ("clock ahead", "clock behind", "another corpus"):
        assert found == Verdict(ENOUGH, tuple(NODES), {})  # the same everywhere is what is asked
    else:
        assert (found.code, found.bad, len(found.stop)) == (STOP, {}, 1) and reason in found.stop[0]


def test_two_reasons_of_a_node_are_both_told():
    found = verdict(lambda node: {"clock_s": 60.0, "free_memory": 0} if node == NODES[9] else {})
    assert len(found.bad[NODES[9]]) == 2


def test_too_few_good_nodes_are_not_a_start():
    found = verdict(lambda node: {"gpus": ()} if node in NODES[3:6] else {})
    assert (found.code, list(found.bad), found.stop) == (FEW, NODES[3:6], ())


def test_a_node_that_said_nothing_is_no_good_node():
    facts = {node: GOOD for node in NODES if node != NODES[7]}
    found = judge(WANTED, NODES, facts, [Finding(NODES[7], "silent", "did not come in 60 s")])
    assert found.bad == {NODES[7]: ("did not come in 60 s",)} and NODES[7] not in found.good


def test_most_nodes_silent_is_the_network_and_not_the_nodes():
    silent = [Finding(node, "silent", "did not come in 60 s") for node in NODES[1:]]
    found = judge(WANTED, NODES, {NODES[0]: GOOD}, silent)
    assert (found.code, found.bad) == (STOP, {}) and "on 63 of 64 nodes: did not come in 60 s" in found.stop[0]


@pytest.mark.parametrize(("what", "code"), [("a GPU is missing", FEW), ("no corpus", STOP), ("disk", STOP)])
def test_one_node_alone_is_replaced_for_what_is_its_own_only(what, code):
    facts = {"only": dataclasses.replace(GOOD, **BAD[what][0])}  # type: ignore[arg-type]
    assert judge(dataclasses.replace(WANTED, nodes=1), ["only"], facts).code == code


def test_the_first_nodes_clock_can_be_the_wrong_one():
    found = verdict(lambda node: {} if node == NODES[0] else {"clock_s": 100.0 + 0.01 * int(node[4:])})
    assert list(found.bad) == [NODES[0]] and "behind the others" in found.bad[NODES[0]][0]


def test_a_version_that_a_node_was_not_asked_for_is_not_missing():
    versions = {name: text for name, text in GOOD.versions.items() if name != "NCCL"}
    assert len(verdict(lambda node: {"versions": versions, "gpus": ()} if node == NODES[5] else {}).bad[NODES[5]]) == 1


def test_a_clock_that_was_read_slowly_is_given_the_doubt():
    assert not verdict(lambda node: {"clock_s": 8.0, "clock_error_s": 4.0} if node == NODES[5] else {}).bad


def test_of_two_nodes_with_two_drivers_the_first_is_kept():
    facts = {"a": GOOD, "b": dataclasses.replace(GOOD, versions={**GOOD.versions, "driver": "535"})}
    assert list(judge(dataclasses.replace(WANTED, nodes=2), ["a", "b"], facts).bad) == ["b"]


@pytest.mark.parametrize(
    ("first", "second", "code"), [("ext4", "ext4", STOP), ("nfs4", "ext4", FEW), ("nfs4", "nfs4", STOP)]
)
def test_of_two_nodes_one_lacks_the_mount_or_the_run_directory_is_local(first, second, code):
    facts = {
        "a": dataclasses.replace(GOOD, filesystem=first),
        "b": dataclasses.replace(GOOD, filesystem=second, token=False),
    }
    found = judge(dataclasses.replace(WANTED, nodes=2), ["a", "b"], facts)
    assert (found.code, list(found.bad)) == (code, ["b"] if code == FEW else [])


def test_gpus_that_nvidia_smi_does_not_know_are_not_counted():
    wanted = dataclasses.replace(WANTED, config=dataclasses.replace(WANTED.config, gpus="unchecked"))
    assert verdict(lambda node: {"gpus": ()}, wanted).code == ENOUGH


@pytest.mark.parametrize(
    ("clock", "code", "words"),
    [
        (Clock(None, 1.0, 60.0), ENOUGH, ""),
        (Clock(86400.0, 1.0, 60.0), ENOUGH, ""),
        (Clock(100.0, 1.0, 60.0), FEW, "1m40s are left, the last save is asked for 2m00s before the end and takes"),
        (Clock(170.0, None, 60.0), FEW, "2m50s are left"),
        (Clock(220.0, 1.0, 10.0), ENOUGH, "3m40s are left, less than the 1m50s to the next checkpoint"),
        (Clock(86400.0, 1.0, 300.0), ENOUGH, "a save took 5m00s, but is asked for only 2m00s before the end"),
    ],
)
def test_time_left_is_weighed_against_interval_and_save(clock, code, words):
    found = verdict(lambda node: {}, clock=clock)
    assert (found.code, found.bad, found.stop) == (code, {}, ())
    assert (found.short if code == FEW else "".join(found.warnings)).startswith(words)
    assert bool(words) == bool(found.short or found.warnings)
