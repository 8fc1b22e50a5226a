#!/usr/bin/env bash
# Installs what tests/slurm needs to bring up a Slurm cluster on this machine: Debian's or Ubuntu's Slurm daemons and
# commands, munge, and `ip` for nodes with addresses of their own. 10 small packages, 13 MB on disk.
# Starts nothing and writes nothing under /etc/slurm: the tests' cluster keeps its configuration in a folder of its own.
# A second call finds everything there and does nothing. Quiet unless something fails.
set -euo pipefail

declare -A package=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [ip]=iproute2)
export PATH=$PATH:/usr/sbin:/sbin # where daemons are, not always on an ordinary user's path

missing=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if ((${#missing[@]} == 0)); then exit 0; fi

if ! command -v apt-get >/dev/null; then
    echo "install_slurm: no apt-get here; install ${missing[*]} as this system does, then start again" >&2
    exit 1
fi
as_root=()
if ((EUID != 0)); then as_root=(sudo -n); fi

output=$(mktemp)
policy=/usr/sbin/policy-rc.d
trap 'rm -f "$output"' EXIT

apt() { # another apt may be at work: wait for its lock, and try again when the index moved meanwhile
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >>"$output" 2>&1
}

if [[ ! -e $policy ]]; then # the packages' services must not start: an unconfigured slurmd only fails
    "${as_root[@]}" sh -c "printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy"
    trap 'rm -f "$output"; "${as_root[@]}" rm -f "$policy"' EXIT
fi
for attempt in 1 2 3; do
    if apt update && apt install -y --no-install-recommends "${missing[@]}"; then
        exit 0
    fi
    echo "install_slurm: try $attempt of 3 failed" >>"$output"
    sleep "$attempt"
done
cat "$output" >&2
echo "install_slurm: apt-get could not install ${missing[*]}" >&2
exit 1
