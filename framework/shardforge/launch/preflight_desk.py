"""The desk on the first node, and the line that each node keeps to it: questions go out, answers come back or do not.

One line of JSON each way over TCP. Whoever does not answer in time is lost, with the reason, and is not asked again;
nobody waits for anybody longer than that.

    node -> desk   {"start": ..., "node": ...}          greeting; the desk answers {"welcome": true} or closes
    desk -> node   {"id": 3, "ask": "facts", ...}
    node -> desk   {"id": 3, "value": ...} or {"id": 3, "error": "why"}
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardforge.core.errors import LaunchError

SEND_S = 5.0
SILENCE_S = 900.0
"""A node to which the desk has said nothing for this long is alone."""
AGAIN_S = 0.25
"""A node asks for the desk again after this time, until the desk is there."""
CHUNK, LONGEST = 1 << 16, 1 << 24
END = "end"


class PortTaken(LaunchError):
    """Somebody else listens there, and another try takes another port."""


@dataclass(frozen=True)
class Answer:
    value: Any
    error: str
    sent: float  # seconds since 1970, when the question left the desk
    received: float


@dataclass
class _Line:
    """One connection and what has come over it."""

    socket: socket.socket
    node: str = ""  # empty until it has greeted
    buffer: bytes = b""
    early: list[dict[str, Any]] = field(default_factory=list)  # what came with the welcome
    silence_s: float = SILENCE_S

    def send(self, message: Mapping[str, Any]) -> None:
        self.socket.settimeout(SEND_S)
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        self.socket.settimeout(self.silence_s)

    def receive(self) -> list[dict[str, Any]]:
        """Whole messages that are there. OSError when the other side is gone."""
        came = self.socket.recv(CHUNK)
        if not came or len(self.buffer) > LONGEST:
            raise ConnectionError("the connection ended")
        *whole, self.buffer = (self.buffer + came).split(b"\n")
        return [json.loads(each) for each in whole]


@dataclass
class Desk:
    """`nodes` are expected, in this order; `lost` says of those that are not there any more, why."""

    start: str
    nodes: Sequence[str]
    port: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)  # of each node, as the desk sees it

    def __post_init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._count = 0
        self._selector = selectors.DefaultSelector()
        try:
            self._server = _listen(self.port, len(self.nodes))
        except OSError as cause:
            what = f"port {self.port} cannot be listened on: {cause.strerror}"
            raise PortTaken(what, socket.gethostname(), "choose another port for this try") from cause
        self.port = self._server.getsockname()[1]
        self._selector.register(self._server, selectors.EVENT_READ, None)

    @property
    def present(self) -> list[str]:
        return [node for node in self.nodes if node in self._lines]

    def admit(self, patience_s: float) -> None:
        """Returns when all nodes have come, or after this time; who has not come is lost then."""
        until = time.monotonic() + patience_s
        while len(self._lines) < len(self.nodes) and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._accept() if key.data is None else self._read(key.data, {}, {})
        for node in self.nodes:
            if node not in self._lines:
                self.lost[node] = f"did not come in {patience_s:.3g} s"

    def ask(self, ask: str, patience_s: float, each: Mapping[str, Any] | None = None, **all_: Any) -> dict[str, Answer]:
        """Put a question to all present nodes, or to those in `each` with what is theirs, and wait for the answers."""
        self._count += 1
        sent: dict[str, float] = {}
        answers: dict[str, Answer] = {}
        for node in self.present if each is None else [node for node in self.present if node in each]:
            own = {} if each is None else {"own": each[node]}
            sent[node] = time.time()
            try:
                self._lines[node].send({"id": self._count, "ask": ask, **all_, **own})
            except OSError as error:
                self._lose(node, f"cannot be asked for {ask}: {error}")
        until = time.monotonic() + patience_s
        while self._waiting(sent, answers) and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._refuse() if key.data is None else self._read(key.data, sent, answers)
        for node in self._waiting(sent, answers):
            self._lose(node, f"did not answer in {patience_s:.3g} s when asked for {ask}")
        return answers

    def close(self) -> None:
        """Dismiss all nodes; they hang up first, so that the port is free at once."""
        for node in self.present:
            try:
                self._lines[node].send({"id": 0, "ask": END})
                self._lines[node].socket.settimeout(1.0)
                self._lines[node].socket.recv(1)
            except OSError:
                pass
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._drop(key.data)
        self._selector.close()
        self._server.close()

    def _waiting(self, sent: Iterable[str], answers: Mapping[str, Answer]) -> list[str]:
        return [node for node in sent if node in self._lines and node not in answers]

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _refuse(self) -> None:
        """Who comes late is lost already."""
        self._server.accept()[0].close()

    def _read(self, line: _Line, sent: Mapping[str, float], answers: dict[str, Answer]) -> None:
        now = time.time()
        line.socket.settimeout(SEND_S)
        try:
            for message in line.receive():
                if not line.node:
                    self._greet(line, message)
                elif message.get("id") == self._count and line.node in sent:
                    answers[line.node] = Answer(message.get("value"), message.get("error", ""), sent[line.node], now)
        except (OSError, ValueError, AttributeError) as error:
            self._lose(line.node, f"was there and is gone: {error}") if line.node else self._drop(line)

    def _greet(self, line: _Line, message: Mapping[str, Any]) -> None:
        node = message.get("node", "")
        if message.get("start") != self.start or node not in self.nodes or node in self._lines:
            raise ConnectionError("not of this start")
        line.send({"welcome": True})
        line.node = node
        self._lines[node] = line
        self.addresses[node] = line.socket.getpeername()[0].removeprefix("::ffff:")

    def _lose(self, node: str, why: str) -> None:
        self.lost[node] = why
        self._drop(self._lines.pop(node))

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.socket.close()


def _listen(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=max(128, backlog)
            )
        except OSError as error:
            if _ipv6():
                raise error
    return socket.create_server(("", port), backlog=max(128, backlog))


def _ipv6() -> bool:
    """Whether this machine has it at all: the kernel may know it and no address be there."""
    try:
        socket.create_server(("", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def serve(
    head: str,
    port: int,
    start: str,
    node: str,
    answer: Callable[[str, dict[str, Any]], Any],
    patience_s: float,
) -> bool:
    """Be one of the nodes until the desk says that it is over; False when the desk was never there."""
    line = _come(head, port, start, node, patience_s)
    if line is None:
        return False
    with line.socket:
        try:
            messages = line.early
            while True:
                for message in messages:
                    if message["ask"] == END:
                        return True
                    line.send({"id": message["id"], **_answered(answer, message)})
                messages = line.receive()
        except OSError:
            return True  # the desk has lost this node, or ended


def _answered(answer: Callable[[str, dict[str, Any]], Any], message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": answer(message["ask"], message)}
    except Exception as error:  # whatever is wrong with this node is for the desk to say
        return {"error": f"{type(error).__name__}: {error}"}


def _come(head: str, port: int, start: str, node: str, patience_s: float) -> _Line | None:
    until = time.monotonic() + patience_s
    while (left := until - time.monotonic()) > 0:
        try:
            line = _Line(socket.create_connection((head, port), timeout=left))
            try:
                line.send({"start": start, "node": node})
                line.socket.settimeout(left)
                welcome, *line.early = line.receive()
                if welcome == {"welcome": True}:
                    line.socket.settimeout(line.silence_s)
                    return line
            except (OSError, ValueError):
                pass
            line.socket.close()
        except OSError:
            pass
        time.sleep(min(AGAIN_S, left))
    return None
