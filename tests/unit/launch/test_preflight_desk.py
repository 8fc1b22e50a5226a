from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from shardforge.launch.preflight_desk import Desk, PortTaken, serve

SOON_S, LONG_S = 1.5, 30.0
"""Patience where somebody does not answer, and where all do."""


@contextmanager
def desk(nodes: str, **answers: Callable[[str, dict[str, Any]], Any]) -> Iterator[tuple[Desk, dict[str, bool]]]:
    """A desk for `nodes`, and those in `answers` as threads; what each of them came back with, at the end."""
    open_, ended = Desk("s1", nodes.split()), {}

    def be(node: str) -> None:
        ended[node] = serve("127.0.0.1", open_.port, "s1", node, answers[node], LONG_S)

    threads = [threading.Thread(target=be, args=(node,)) for node in answers]
    for thread in threads:
        thread.start()
    try:
        yield open_, ended
    finally:
        open_.close()
        for thread in threads:
            thread.join()


def echo(ask: str, message: dict[str, Any]) -> Any:
    return [ask, message.get("word"), message.get("own")]


def test_all_answer_the_same_question():
    with desk("a b c", a=echo, b=echo, c=echo) as (here, _):
        here.admit(LONG_S)
        answers = here.ask("look", LONG_S, word="x")
    assert {node: answer.value for node, answer in answers.items()} == {node: ["look", "x", None] for node in "abc"}
    assert not here.lost


def test_each_can_be_asked_its_own():
    with desk("a b c", a=echo, b=echo, c=echo) as (here, _):
        here.admit(LONG_S)
        answers = here.ask("look", LONG_S, {"a": 1, "c": {"x": 2}})
    assert {node: answer.value[2] for node, answer in answers.items()} == {"a": 1, "c": {"x": 2}}


def test_an_answer_of_a_megabyte_arrives_whole():
    with desk("a", a=lambda ask, message: "x" * 1_000_000) as (here, _):
        here.admit(LONG_S)
        assert len(here.ask("look", LONG_S)["a"].value) == 1_000_000


def test_who_does_not_come_is_lost_and_the_others_go_on():
    with desk("a b c", a=echo, c=echo) as (here, _):
        here.admit(SOON_S)
        assert here.lost == {"b": "did not come in 1.5 s"} and here.present == ["a", "c"]
        assert set(here.ask("look", LONG_S)) == {"a", "c"}


def test_who_does_not_answer_is_lost_and_the_others_go_on():
    waiting = threading.Event()

    def silent(ask: str, message: dict[str, Any]) -> Any:
        waiting.wait()

    with desk("a b", a=echo, b=silent) as (here, _):
        here.admit(LONG_S)
        assert set(here.ask("look", SOON_S)) == {"a"}
        assert here.lost == {"b": "did not answer in 1.5 s when asked for look"} and here.present == ["a"]
        waiting.set()


def test_who_goes_away_is_lost_at_once():
    with desk("a b", a=echo) as (here, _):
        with socket.create_connection(("127.0.0.1", here.port)) as b:
            b.sendall(b'{"start": "s1", "node": "b"}\n')
            here.admit(LONG_S)
            assert b.recv(100) == b'{"welcome": true}\n'
        assert set(here.ask("look", LONG_S)) == {"a"} and here.lost["b"].startswith("was there and is gone")


def test_what_a_node_fails_with_is_told_and_it_stays():
    def fails(ask: str, message: dict[str, Any]) -> Any:
        raise ValueError("no such thing")

    with desk("a", a=fails) as (here, _):
        here.admit(LONG_S)
        assert here.ask("look", LONG_S)["a"].error == "ValueError: no such thing" and here.present == ["a"]


STRANGERS = {
    "another start": b'{"start": "s0", "node": "b"}\n',
    "another node": b'{"start": "s1", "node": "x"}\n',
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "a list": b"[1]\n",
    "no text": b"\xff\n",
}


@pytest.mark.parametrize("greeting", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_sent_away(greeting):
    with desk("a b", a=echo) as (here, _), socket.create_connection(("127.0.0.1", here.port)) as stranger:
        stranger.sendall(greeting)
        here.admit(SOON_S)
        assert stranger.recv(100) == b"" and here.present == ["a"]


def test_nodes_are_dismissed_with_a_good_word_and_the_port_is_free_again():
    with desk("a b", a=echo, b=echo) as (here, ended):
        here.admit(LONG_S)
    assert ended == {"a": True, "b": True}
    Desk("s2", ["a"], here.port).close()


def test_a_node_without_a_desk_gives_up():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert not serve("127.0.0.1", port, "s1", "a", echo, SOON_S)


def test_a_node_is_not_taken_in_by_another_service():
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert not serve("127.0.0.1", other.getsockname()[1], "s1", "a", echo, SOON_S)


def test_a_port_that_is_taken_is_said():
    with closing(Desk("s1", ["a"])) as other, pytest.raises(PortTaken, match="cannot be listened on"):
        Desk("s2", ["a"], other.port)


def test_answers_carry_the_times_between_which_they_were_given():
    with desk("a", a=lambda ask, message: time.time()) as (here, _):
        here.admit(LONG_S)
        answer = here.ask("clock", LONG_S)["a"]
    assert answer.sent <= answer.value <= answer.received


def test_the_desk_sees_where_a_node_is():
    with desk("a", a=echo) as (here, _):
        here.admit(LONG_S)
        assert here.addresses == {"a": "127.0.0.1"}


def test_nodes_can_come_over_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    here = Desk("s1", ["a"])
    thread = threading.Thread(target=serve, args=("::1", here.port, "s1", "a", echo, 2.0))
    thread.start()
    here.admit(LONG_S)
    assert here.addresses == {"a": "::1"}
    here.close()
    thread.join()
