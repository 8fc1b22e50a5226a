"""Keeps a lab alive: starts its daemons and nodes on request, and ends everything when its input closes.

A script of its own, run by lab.py. With namespaces it is PID 1 of a PID, network, mount and host name namespace that
holds the whole cluster, so that nothing, not even SIGKILL, can end it and leave a daemon, an address or a mount behind.

    input, JSON lines:  {"do": "daemon" | "node" | "kill", "name": ..., ...}
    output:             one JSON line each: {} or {"error": ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 20.0
BRIDGE, NETWORK, HEAD = "lab0", "10.77.0", 254
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: orphans below become children of this process."""

NODE = """
hostname "$NAME"
mount --bind "$LAB/hosts" /etc/hosts
mount -t tmpfs -o size=1g shm /dev/shm
mount -t tmpfs -o size=64m own "$LAB/local"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add "$ADDRESS/24" dev eth0; ip link set eth0 up
while :; do slurmd -D -N "$NAME"; sleep 1; done
"""
"""A machine's PID 1: it reaps, starts its slurmd again as a service manager would, and its death is a power cut.
LAB/local is a disk that only this node sees."""


def address(number: int) -> str:
    return f"{NETWORK}.{number}"


class Keeper:
    def __init__(self, lab: Path, apart: bool):
        self.lab, self.apart = lab, apart
        self.running: dict[str, int] = {}
        if apart:
            self._head()
        else:
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)

    def _head(self) -> None:
        """The machine that the controller and the tests' commands run on, with a bridge to the nodes."""
        call("hostname", "head")
        call("mount", "--bind", str(self.lab / "hosts"), "/etc/hosts")
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "addr", "add", f"{address(HEAD)}/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")

    def start(self, name: str, words: list[str], **more: str) -> None:
        """A process in the foreground, in a session of its own; what it prints goes to log/NAME.console."""
        with open(self.lab / "log" / f"{name}.console", "ab") as output:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, **more},
            )  # fmt: skip
        self.running[name] = process.pid
        process.returncode = 0  # reaped below, by reap()

    def node(self, name: str, number: int) -> None:
        if not self.apart:
            return self.start(name, ["slurmd", "-D", "-N", name])
        words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.start(name, [*words, "bash", "-c", NODE], NAME=name, ADDRESS=address(number), LAB=str(self.lab))
        pid, here = self.running[name], os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + PATIENCE_S
        while os.readlink(f"/proc/{pid}/ns/net") == here:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} has no network namespace after {PATIENCE_S} s")
            time.sleep(0.01)
        call("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        call("ip", "link", "set", name, "master", BRIDGE, "up")

    def kill(self, name: str) -> None:
        """SIGKILL to a daemon, or to a node with all that runs on it."""
        pid = self.running.pop(name)
        if not self.apart:
            kill_tasks_of(name, str(self.lab / "slurm.conf"))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if self.apart:
            with contextlib.suppress(subprocess.CalledProcessError):  # it goes with the namespace of its other end
                call("ip", "link", "del", name)

    def serve(self) -> None:
        line = b""
        while True:
            reap()
            if not select.select([0], [], [], 1.0)[0]:
                continue
            got = os.read(0, 65536)
            if not got:
                return
            line += got
            while b"\n" in line:
                asked, _, line = line.partition(b"\n")
                print(json.dumps(self._answer(json.loads(asked))), flush=True)

    def _answer(self, asked: dict) -> dict:
        do = asked.pop("do")
        try:
            {"daemon": self.start, "node": self.node, "kill": self.kill}[do](**asked)
        except (OSError, KeyError, subprocess.CalledProcessError) as error:
            return {"error": f"{do} {asked}: {error!r}"}
        return {}


def call(*words: str) -> None:
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=2)


def reap() -> None:
    """Bury what ended, also what was left by those who started it."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_tasks_of(node: str, conf: str) -> None:
    """SIGKILL to what a job runs on a node that shares this machine's PIDs, its slurmstepd first."""
    wanted = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={conf}".encode()}
    tasks = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if Path("/proc", parent, "comm").read_text().strip() == "slurmstepd":
                    tasks.insert(0, int(parent))
                tasks.append(int(process.name))
    for pid in tasks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_descendants() -> None:
    """SIGKILL to all below this process; what they leave comes to it and is ended too."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children:
            return
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        for pid in children:
            os.waitpid(int(pid), 0)


if __name__ == "__main__":
    for asking in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asking, signal.SIG_IGN)  # ctrl-C is for the tests, whose end closes the input
    keeper = Keeper(Path(sys.argv[1]), sys.argv[2] == "apart")
    print("{}", flush=True)
    keeper.serve()
    end_descendants()
