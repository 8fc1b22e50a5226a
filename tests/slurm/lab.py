"""A real Slurm cluster on this machine: slurmctld, munged and some nodes, each with a slurmd and GPUs in name only.

Where the kernel allows namespaces every node has its own host name, address, processes and shared memory, like a
machine; elsewhere the nodes are ports of one address. `with Lab(folder) as lab:` starts one; everything ends with the
block, or with the process, however that ends. `python tests/slurm/lab.py FOLDER` keeps one for use by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # when this file is run by itself
    sys.path.insert(0, str(ROOT))

from tests.slurm.settings import Shape, write  # noqa: E402

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PATIENCE_S = 180.0
"""A wait that takes longer has failed. It bounds a broken lab and times nothing."""
FREEZER = Path("/sys/fs/cgroup/freezer")
IN_USE = FREEZER / "shardforge-lab"
"""Locked by the lab that tracks its jobs by cgroup: the groups of two labs would have the same names."""
KEEPER = Path(__file__).with_name("keeper.py")
APART = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


class LabError(Exception):
    """The lab cannot do what was asked of it; the end of its logs is in the message."""


def missing() -> list[str]:
    """Programs that the lab needs and that are not here."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name) is None]


def can_be_apart() -> bool:
    """Whether this process may give each node namespaces of its own."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    try_all = "hostname lab && mount -t tmpfs try /mnt && ip link add one type bridge && ip link add two type veth"
    return subprocess.run([*APART, "sh", "-c", try_all], capture_output=True).returncode == 0


def wait(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Return when `condition` holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {patience_s:.0f} s")
        time.sleep(0.05)


class Lab:
    def __init__(self, folder: Path, shape: Shape | None = None, apart: bool | None = None, port: int = 17000):
        """`apart` is whether nodes get namespaces; by default they do where the kernel allows it."""
        self.folder, self.shape, self.port = folder.resolve(), shape or Shape(), port
        self.nodes = self.shape.names()
        self.apart = can_be_apart() if apart is None else apart
        self.conf = self.folder / "slurm.conf"
        self._keeper: subprocess.Popen[str] | None = None
        self._freezer: int | None = None

    def __enter__(self) -> Lab:
        end_abandoned()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._keeper is not None:
            assert self._keeper.stdin is not None and self._keeper.stdout is not None
            self._keeper.stdin.close()
            try:
                self._keeper.wait(PATIENCE_S)
            finally:
                self._keeper.kill()
                self._keeper.stdout.close()
        if self._freezer is not None:
            os.close(self._freezer)

    # what a test does with it

    def command(self, *words: str, folder: Path | None = None) -> list[str]:
        """The command that runs `words` on the cluster's head."""
        if not self.apart:
            return list(words)
        here = folder or self.folder
        return [
            "nsenter",
            f"--target={self._head()}",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wd={here}",
            "--",
            *words,
        ]

    def env(self, **more: str) -> dict[str, str]:
        """This process's environment, with the cluster."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**plain, "SLURM_CONF": str(self.conf), **more}

    def call(
        self, *words: str, folder: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `words` on the head to their end."""
        return subprocess.run(
            self.command(*words, folder=folder), cwd=folder or self.folder, env=self.env(**(env or {})),
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        """What a Slurm command prints; a refusal is an error."""
        done = self.call(*words)
        if done.returncode:
            raise LabError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: Path, *options: str, env: Mapping[str, str] | None = None) -> str:
        """The job's number."""
        done = self.call("sbatch", "--parsable", *options, str(script), folder=script.parent, env=env)
        if done.returncode:
            raise LabError(f"sbatch {script}: {done.stderr.strip()}")
        return done.stdout.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ..."""
        words = self.ask("scontrol", "-o", "show", "job", number).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, number: str, *states: str, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait until the job is in one of `states`."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(number))
            return found["JobState"] in states

        try:
            wait(there, f"job {number} {' or '.join(states)}", patience_s)
        except LabError as error:
            raise LabError(f"{error}; it is {found.get('JobState')} ({found.get('Reason')})") from error
        return found

    def over(self, number: str, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait for the job's end."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")
        return self.until(number, *ends, patience_s=patience_s)

    def idle(self) -> None:
        """Wait until every node waits for work, also nodes that were put back."""
        wait(lambda: self._idle() == set(self.nodes), "all nodes idle")

    def cut_power(self, node: str) -> None:
        """The node ends at once, with all that runs on it."""
        self._do("kill", name=node)

    def power_on(self, node: str) -> None:
        self._do("node", name=node, number=self.nodes.index(node) + 1)
        self.mark_well(node)

    def mark_down(self, node: str, reason: str = "test") -> None:
        """As an administrator does; its jobs are requeued at once."""
        self.ask("scontrol", "update", f"nodename={node}", "state=down", f"reason={reason}")

    def mark_well(self, node: str) -> None:
        """Also a node that has come back by itself, of which Slurm says that it cannot be resumed."""
        self.call("scontrol", "update", f"nodename={node}", "state=resume")

    def logs(self, lines: int = 15) -> str:
        """The end of what each daemon wrote."""
        found = sorted((self.folder / "log").glob("*"))
        ends = ["\n".join(path.read_text(errors="replace").splitlines()[-lines:]) for path in found]
        return "\n".join(f"== {path.name}\n{end}" for path, end in zip(found, ends, strict=True))

    # how it is made

    def _start(self) -> None:
        write(self.folder, self.shape, self.apart, self.port, "cgroup" if self._track() else "linuxproc")
        words = [sys.executable, "-S", str(KEEPER), str(self.folder), "apart" if self.apart else "together"]
        with open(self.folder / "log" / "keeper.console", "ab") as output:
            self._keeper = subprocess.Popen(
                [*APART, *words] if self.apart else words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=output, text=True, env=self.env(), start_new_session=True,
            )  # fmt: skip
        self._answer()
        (self.folder / "keeper").write_text(f"{self._keeper.pid} {started(self._keeper.pid)}")
        self._do("daemon", name="munged", words=self._munged())
        wait((self.folder / "run" / "munge.socket").exists, "munged's socket")
        self._do("daemon", name="slurmctld", words=["slurmctld", "-D", "-c"])
        for number, node in enumerate(self.nodes, 1):
            self._do("node", name=node, number=number)
        try:
            self.idle()
        except LabError as error:
            raise LabError(f"{error}\n{self.logs()}") from error

    def _munged(self) -> list[str]:
        run = self.folder / "run"
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        places = [f"--{option}={run / name}" for option, name in names.items()]
        return ["munged", "--foreground", "--force", *places, f"--log-file={self.folder / 'log' / 'munged.log'}"]

    def _track(self) -> bool:
        """Whether jobs are tracked by cgroup: its writable older kind, and no other lab that uses it."""
        try:
            IN_USE.mkdir(exist_ok=True)
            self._freezer = os.open(IN_USE, os.O_RDONLY)
            fcntl.flock(self._freezer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        for node in self.nodes:
            for left in sorted(FREEZER.glob(f"slurm_{node}/**/"), reverse=True):
                with contextlib.suppress(OSError):
                    left.rmdir()
        return True

    def _idle(self) -> set[str]:
        done = self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        return set(done.stdout.split())

    def _head(self) -> int:
        """The keeper's process number, as seen from here."""
        assert self._keeper is not None
        return int(Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text().split()[0])

    def _do(self, do: str, **more: object) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None
        print(json.dumps({"do": do, **more}), file=self._keeper.stdin, flush=True)
        self._answer()

    def _answer(self) -> None:
        assert self._keeper is not None and self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        answer = json.loads(line) if line else {"error": "the lab's keeper ended"}
        if answer:
            raise LabError(f"{answer['error']}\n{self.logs()}")


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" when it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == "Z" else words[19]


def abandoned() -> Iterator[int]:
    """Processes of labs whose keeper is gone: only where there were no namespaces to end with it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            conf = next((word.partition("=")[2] for word in words if word.startswith("SLURM_CONF=")), "")
            pid, _, start = Path(conf).with_name("keeper").read_text().partition(" ")
            if started(int(pid)) != start and int(process.name) != os.getpid():
                yield int(process.name)


def end_abandoned() -> None:
    for pid in abandoned():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    if missing():
        sys.exit(f"not here: {', '.join(missing())}; tools/ci/install_slurm.sh installs them")
    with Lab(Path(sys.argv[1])) as kept:
        entered = " ".join(kept.command()[:-1])
        print(f"export SLURM_CONF={kept.conf}\nrun commands on the head with: {entered}", flush=True)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
