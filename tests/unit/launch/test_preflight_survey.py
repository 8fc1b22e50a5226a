from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from shardforge.launch import preflight_facts, preflight_survey
from shardforge.launch.preflight_checks import FEW, judge
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_desk import Desk, serve
from shardforge.launch.preflight_facts import Facts, Gpu
from shardforge.launch.preflight_survey import Survey, clocks, conduct
from shardforge.launch.preflight_wanted import Wanted

NODES = [f"n{number}" for number in range(8)]
WANTED = Wanted(nodes=6, gpus=2, config=PreflightConfig(pair_gb_s=20.0, inside_gb_s=100.0, all_reduce_gb_s=50.0))
GPUS = tuple(Gpu(index=index, name="H", used=0, ecc=0) for index in range(2))
FACTS = Facts(
    host="h", gpus=GPUS, versions={"torch": "2"}, free_memory=1 << 40, free_disk=1 << 40, write_bytes_s=1e9
)  # fmt: skip


class Fake:
    """A node that answers as told: `speed` of each lane in a pair, `inside` of its own GPUs; `change` of its facts."""

    def __init__(
        self, speed: float = 24.0, inside: float = 200.0, nccl: str = "2.27", ahead: float = 0.0, **change: Any
    ):
        self.speed, self.inside, self.nccl, self.ahead, self.change = speed, inside, nccl, ahead, change
        self.asked: list[str] = []
        self.over = threading.Event()  # the survey has all that it gets

    def answer(self, ask: str, message: dict[str, Any]) -> Any:
        self.asked.append(ask)
        if ask == "clock":
            return time.time() + self.ahead
        if ask == "facts":
            return preflight_facts.plain(dataclasses.replace(FACTS, **self.change))
        return [self.lane(question) for question in message["own"]] if ask == "lanes" else None

    def lane(self, question: dict[str, Any]) -> dict[str, Any]:
        if question["ask"] == "hello":
            return {"versions": {"NCCL": self.nccl}} if self.nccl else {"error": "RuntimeError: no CUDA GPUs"}
        if question["ask"] == "open":
            return {"port": 1}
        assert question["address"] == "127.0.0.1" and 0 <= question["rank"] < question["size"]
        if not self.speed:
            return {"error": "DistBackendError: timeout"}
        return {"gb_s": self.speed if question["op"] == "pair" else self.inside}


@pytest.fixture
def survey() -> Callable[..., Survey]:
    """What is found out about eight nodes, of which the given are as told."""

    def run(wanted: Wanted = WANTED, **special: Fake) -> Survey:
        desk = Desk("s", NODES)
        fakes = {node: special.get(node, Fake()) for node in NODES}
        threads = [
            threading.Thread(target=serve, args=("127.0.0.1", desk.port, "s", node, fake.answer, 30.0))
            for node, fake in fakes.items()
        ]
        for thread in threads:
            thread.start()
        desk.admit(30.0)
        try:
            return conduct(desk, wanted, "token", {})
        finally:
            desk.close()
            for fake in fakes.values():
                fake.over.set()
            for thread in threads:
                thread.join()

    return run


def bad(found: Survey) -> dict[str, tuple[str, ...]]:
    return dict(judge(WANTED, NODES, found.facts, found.findings).bad)


def test_eight_good_nodes_are_measured_and_good(survey):
    found = survey()
    assert not bad(found) and not found.warnings
    assert [rate.gb_s for rate in found.pairs] == [48.0] * 4  # both lanes of each pair together
    assert [rate.gb_s for rate in found.inside] == [200.0] * 8
    assert found.together is not None and found.together.gb_s == 200.0 and len(found.together.nodes) == 8
    assert found.facts["n3"].versions == {"torch": "2", "NCCL": "2.27"}


SICK: dict[str, tuple[Fake, str]] = {
    "slow": (Fake(speed=2.0), "4 GB/s; with"),
    "dead link": (Fake(speed=0.0), "DistBackendError: timeout"),
    "slow inside": (Fake(inside=30.0), "all-reduce among its GPUs: 30 GB/s; the floor is 100 GB/s"),
    "GPU does not work": (Fake(nccl=""), "GPU 0: RuntimeError: no CUDA GPUs"),
    "another NCCL": (Fake(nccl="2.21"), "NCCL 2.21, 2.27 on the others"),
    "clock": (Fake(ahead=100.0), "its clock is 1m40s ahead of the others"),
    "facts": (Fake(gpus=GPUS[:1]), "1 GPUs are there, 2 are asked"),
}


@pytest.mark.parametrize("what", SICK)
@pytest.mark.parametrize("node", ["n1", "n6"])
def test_the_sick_node_and_no_other_is_found(survey, what, node):
    fake, reason = SICK[what]
    found = bad(survey(**{node: fake}))
    assert list(found) == [node] and reason in found[node][0]


def test_nodes_that_are_bad_already_are_not_measured(survey):
    sick = Fake(gpus=())
    found = survey(n2=sick)
    assert "lanes" not in sick.asked  # nothing is to be learned from a GPU that is not there
    assert not any("n2" in rate.nodes for rate in (*found.pairs, *found.inside))


def test_the_sum_over_all_is_of_the_good_nodes(survey):
    found = survey(n2=Fake(speed=1.0))
    assert found.together is not None and found.together.nodes == tuple(node for node in NODES if node != "n2")


def test_an_all_reduce_below_its_floor_is_a_warning_and_names_nobody(survey):
    wanted = dataclasses.replace(WANTED, config=dataclasses.replace(WANTED.config, all_reduce_gb_s=300.0))
    found = survey(wanted)
    assert not bad(found)
    assert not found.broken and found.warnings == [
        "the all-reduce over 8 nodes reaches 200 GB/s, the floor is 300 GB/s; no node can be named for it"
    ]


def test_an_all_reduce_that_fails_is_no_start_and_names_nobody(survey):
    class Apart(Fake):
        def lane(self, question: dict[str, Any]) -> dict[str, Any]:
            whole = question.get("op") == "all_reduce" and question["size"] > 2
            return {"error": "DistBackendError: timeout"} if whole else super().lane(question)

    found = survey(n3=Apart())
    assert not bad(found)
    assert found.broken.startswith("the all-reduce over 8 nodes failed, though each pair works: n3: GPU 0: Dist")
    assert judge(WANTED, NODES, found.facts, found.findings, broken=found.broken).code == FEW


def test_without_gpus_floors_and_share_nothing_is_measured(survey):
    fake = Fake()
    found = survey(Wanted(nodes=8, config=PreflightConfig(share=0.0)), n0=fake)
    assert (found.pairs, found.inside, found.together) == ([], [], None) and "lanes" not in fake.asked


def test_a_node_that_cannot_look_at_itself_is_bad(survey):
    class Broken(Fake):
        def answer(self, ask: str, message: dict[str, Any]) -> Any:
            if ask == "facts":
                raise OSError("Stale file handle")
            return super().answer(ask, message)

    assert bad(survey(n4=Broken())) == {"n4": ("cannot look at itself: OSError: Stale file handle",)}


def test_a_node_that_falls_silent_while_it_measures_is_named_and_not_its_partner(survey, monkeypatch):
    for name in ("MEASURE_S", "SLACK_S"):
        monkeypatch.setattr(preflight_survey, name, 1.0)

    class Frozen(Fake):
        def lane(self, question: dict[str, Any]) -> dict[str, Any]:
            if question.get("op") == "pair":
                self.over.wait()
            return super().lane(question)

    found = bad(survey(n5=Frozen()))
    assert list(found) == ["n5"] and "did not answer in 2 s" in found["n5"][0]


def test_a_clock_is_read_halfway_between_question_and_answer():
    class Answers:
        """A desk whose node answers 4 s, then 2 s, then 6 s after it is asked; its clock is 100 s ahead."""

        def __init__(self) -> None:
            self.delays = iter((4.0, 2.0, 6.0))

        def ask(self, ask: str, patience_s: float) -> dict[str, Any]:
            from shardforge.launch.preflight_desk import Answer

            delay = next(self.delays)
            return {"a": Answer(1000.0 + 100.0 + 0.75 * delay, "", 1000.0, 1000.0 + delay)}

    assert clocks(Answers(), 1.0) == {"a": (100.5, 1.0)}  # type: ignore[arg-type]
