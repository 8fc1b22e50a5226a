"""Everything that the daemons of a lab read: slurm.conf and the files beside it."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONF = """\
ClusterName=lab
SlurmctldHost={head}({head_address})
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/run/slurmctld.pid
SlurmdPidFile={lab}/run/slurmd.%n.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/slurmd.%n.log
AuthType=auth/munge
CredType=cred/munge
# a requeued job may start again when its credential has expired: 120 s elsewhere
AuthInfo=socket={lab}/run/munge.socket,cred_expire=5
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
Epilog={lab}/epilog
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
SlurmdTimeout=10
KillWait=10
MinJobAge=86400
MessageTimeout=10
TCPTimeout=5
BatchStartTimeout=60
# a node that an administrator marked down stays down
ReturnToService=1
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={lab}/log/jobcomp.log
# more CPUs and memory than this machine has
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres={gpus} State=UNKNOWN Feature={features}
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high PriorityTier=100 PreemptMode=OFF
PartitionName=short PriorityTier=10 PreemptMode=OFF MaxTime=2 MaxNodes=2
{partitions}
"""

EPILOG = """\
#!/bin/sh
# End whatever of this job still runs on this node: tracking by parent process loses orphans.
for process in /proc/[0-9]*; do
    tr '\\0' '\\n' <"$process/environ" 2>/dev/null | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" || continue
    tr '\\0' '\\n' <"$process/environ" 2>/dev/null | grep -qx "SLURMD_NODENAME=$SLURMD_NODENAME" || continue
    case $(cat "$process/comm") in epilog | slurm*) ;; *) kill -9 "${process#/proc/}" 2>/dev/null ;; esac
done
exit 0
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the cluster says it has; each type of GPU is also a feature of the nodes."""

    nodes: int = 4
    cpus: int = 16
    gpus: Mapping[str, int] = field(default_factory=lambda: {"h100": 8})
    memory_mb: int = 64000
    partitions: tuple[str, ...] = ()

    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]


def write(folder: Path, shape: Shape, apart: bool, port: int, tracking: str) -> None:
    """The files of a lab; `apart` nodes have addresses, others ports of one, from `port` on."""
    for name in ("state", "log", "run", "dev", "local", *(f"spool/{node}" for node in shape.names())):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "slurm.conf").write_text(_conf(folder, shape, apart, port, tracking))
    names = [f"10.77.0.{number} {node}" for number, node in enumerate(shape.names(), 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 head", *names]) + "\n")
    # without this file slurmd looks for the newer kind, also where only the older is writable
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
    gpus = [(kind, folder / "dev" / f"{kind}-{each}") for kind, number in shape.gpus.items() for each in range(number)]
    for _, path in gpus:
        _device(path)
    devices = [f"Name=gpu Type={kind} File={path}\n" for kind, path in gpus]
    (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(devices))
    (folder / "epilog").write_text(EPILOG)
    (folder / "epilog").chmod(0o755)
    key = folder / "run" / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))


def _conf(folder: Path, shape: Shape, apart: bool, port: int, tracking: str) -> str:
    head = "head" if apart else socket.gethostname().partition(".")[0]
    nodes = []
    for number, name in enumerate(shape.names(), 1):
        place = f"NodeHostname={name} NodeAddr=10.77.0.{number}"
        nodes.append(
            f"NodeName={name} {place if apart else f'NodeHostname={head} NodeAddr=127.0.0.1 Port={port + 10 + number}'}"
        )
    return CONF.format(
        head=head,
        head_address="10.77.0.254" if apart else "127.0.0.1",
        port=port,
        node_port=port + 1,
        user=getpass.getuser(),
        lab=folder,
        tracking=tracking,
        cpus=shape.cpus,
        gpus=",".join(f"gpu:{kind}:{number}" for kind, number in shape.gpus.items()),
        memory=shape.memory_mb,
        features=",".join(shape.gpus),
        nodes="\n".join(nodes),
        partitions="\n".join(f"PartitionName={name} PreemptMode=OFF" for name in shape.partitions),
    )


def _device(path: Path) -> None:
    """A file that stands for a GPU: slurmd counts character devices, and complains of other files."""
    try:
        subprocess.run(["mknod", str(path), "c", "1", "3"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        path.touch()
