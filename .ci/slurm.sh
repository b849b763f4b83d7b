#!/usr/bin/env bash
# A one-node SLURM cluster on this machine (root; Debian: apt-get install slurm-wlm munge), and run_hpc.sh on it: submitted,
# pre-empted by `scontrol requeue`, warned by its time limit (USR1), and seen to resume each time and to finish.
#   bash .ci/slurm.sh        about 10 minutes on 2 cores; prints what the job's log says about it
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d) node=$(hostname -s) out=runs/slurm
rm -rf "$out"

mkdir -p /run/munge && chown munge: /run/munge
pgrep -x munged >/dev/null || runuser -u munge -- munged
cat > "$work/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
MinJobAge=3600
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
JobRequeue=1
OverTimeLimit=0
NodeName=$node CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$work/state" "$work/spool"
export SLURM_CONF=$work/slurm.conf
slurmctld && slurmd
trap 'pkill -F "$work/slurmd.pid"; pkill -F "$work/slurmctld.pid"; rm -rf "$work"' EXIT
sleep 5
sinfo

# A requeued job waits for two minutes; released earlier here.
again() { sleep 15; scontrol update JobId="$job" StartTime=now "$@"; }  # at once, its old credential would still be revoked
state() { squeue -h -j "$job" -o %T 2>/dev/null || true; }
step() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["step"])' "$out/ckpt/last/state.json" 2>/dev/null || echo 0; }
wait_for() { for _ in $(seq 600); do "$@" && return; sleep 1; done; echo "error: waited ten minutes for: $*" >&2; exit 1; }
is_past() { [[ $(step) -gt $1 ]]; }
is() { [[ $(state) == "$1" ]]; }

# A time limit of 3 minutes and its warning 120 s before: the first start is warned after a minute.
job=$(sbatch --parsable --gpus-per-node=0 --cpus-per-task="$(nproc)" --time=3 --output="$work/log" --open-mode=append \
  run_hpc.sh --preset demo --minutes 3 --eval_samples 10 --save_every 10 --out "$out")
echo "== job $job submitted; pre-empting it after its first checkpoint"
wait_for is RUNNING
wait_for is_past 0
echo "== step $(step): scontrol requeue"
scontrol requeue "$job"
wait_for is PENDING
echo "== pending, checkpoint at step $(step)"
before=$(step)
again
wait_for is RUNNING
wait_for is_past "$before"
echo "== running again past step $before; waiting for the warning of its time limit"
wait_for is PENDING
echo "== requeued by the warning, checkpoint at step $(step)"
again TimeLimit=30
wait_for is RUNNING
finished() { grep -q '"finished": true' "$out/ckpt/last/state.json" && [[ -f $out/eval/metrics.json ]]; }
wait_for finished
echo "== trained to the end, step $(step), and evaluating"
scancel "$job"
tr '\r' '\n' < "$work/log" | grep -hE "resuming|stopped by signal|^done:"
