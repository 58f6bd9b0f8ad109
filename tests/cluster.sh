#!/bin/bash
# Try `make cluster` on a real SLURM: install it from Debian's packages, start it with one node on this machine that
# pretends to have a GPU, run benchmarks/cluster.py, and stop it. As root, on a Debian or Ubuntu that may be changed (a
# container), after `make quickstart`. Takes some minutes. CI does not run this.
set -euo pipefail
cd "$(dirname "$0")/.."
PLUGIN=2.8.0  # of snakemake-executor-plugin-slurm; docs/cluster.md names it, too
PYTHON=$PWD/.venv/bin/python
work=$(mktemp -d /tmp/slurm.XXXX)
chmod 755 "$work"

stop() {
  pkill -x slurmctld || true; pkill -x slurmd || true; pkill -x munged || true
  rm -rf "$work"
}
trap stop EXIT

command -v slurmctld > /dev/null || {
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install slurmctld slurmd slurm-client munge
}
"$PYTHON" -m pip install -qq --target "$work/plugin" --no-deps "snakemake-executor-plugin-slurm==$PLUGIN" \
  snakemake-executor-plugin-slurm-jobstep throttler

mkdir -p /etc/slurm /run/munge "$work/state" "$work/spool"
host=$(hostname -s)
cat > /etc/slurm/slurm.conf <<EOF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
MinJobAge=86400
ReturnToService=2
NodeName=$host CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.95)}' /proc/meminfo) Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
touch "$work/gpu0" "$work/gpu1"  # SLURM only looks whether there is a file
echo "NodeName=$host Name=gpu File=$work/gpu[0-1]" > /etc/slurm/gres.conf
printf 'CgroupAutomount=no\n' > /etc/slurm/cgroup.conf

[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key 2> /dev/null; }
chown -R munge: /etc/munge /run/munge; chmod 400 /etc/munge/munge.key
runuser -u munge -- munged
slurmctld && slurmd
for _ in $(seq 30); do sinfo --noheader --states idle | grep -q . && break; sleep 1; done
sinfo --noheader --states idle | grep . || { sinfo --list-reasons; cat "$work/slurmd.log"; exit 1; }

"$PYTHON" benchmarks/cluster.py --plugin "$work/plugin" "$@"
