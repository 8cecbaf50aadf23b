#!/usr/bin/env bash
#SBATCH --job-name=cola
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --output=%x-%j.log
# A Ray cluster for one job: a head on the first node, a worker on each other one, the job, and the end of all of it.
#
#     sbatch --nodes 4 cluster/slurm.sh small --data.mixture /shared/shards 1 --world.pretrained /shared/world --output /shared/runs
#
# The words after the script go to jobs/cotrain.py; COLA_JOB=sweep takes another job. Start it in the top folder of the repository, on a file system
# that all nodes share, with the environment active (or COLA_VENV=FOLDER). Three minutes before its time is up the run is told to write a
# checkpoint: `--resume RUN` goes on. Checked without Slurm: the script's lint and its course, with stand-ins for srun and scontrol.
set -euo pipefail

folder=${SLURM_SUBMIT_DIR:?start this with sbatch}
if [[ -n ${COLA_VENV:-} ]]; then
    export PATH=$COLA_VENV/bin:$PATH
fi
cd "$folder"

# One token for this cluster alone, in a file that only its owner reads and that all nodes see: others share the network.
secrets=$(mktemp -d "${COLA_SECRETS:-$HOME}/.cola-$SLURM_JOB_ID-XXXXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/token
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
export RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S=150
# Each cluster has ports of its own: several jobs may share a node. Ray's other ports are free ones that it picks.
port=$((20000 + SLURM_JOB_ID % 20000))
dashboard=$((port + 20000))
job=cola-$SLURM_JOB_ID

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}

steps=()
# shellcheck disable=SC2329 # the traps below call it
finish() {
    trap - EXIT TERM INT
    # srun passes SIGTERM on; `ray start --block` then ends what it has started.
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2>/dev/null || true
    done
    wait "${steps[@]}" 2>/dev/null || true
    rm -rf "$secrets"
}
# shellcheck disable=SC2329
stop() {
    stopped=1
    ray job stop --address "http://127.0.0.1:$dashboard" "$job" || true
}
trap finish EXIT
trap 'exit 143' TERM INT # as long as there is no job

# This script runs on the first node, so the dashboard on its loopback is in reach, and out of reach for all other nodes.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --port="$port" --num-cpus="$cpus" --num-gpus="$gpus" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port="$((port + 1))" &
steps+=($!)

address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
until ray status --address "$address:$port" >/dev/null 2>&1; do
    kill -0 "${steps[0]}" || exit 1
    sleep 2
done

for node in "${nodes[@]:1}"; do
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
        ray start --block --address="$address:$port" --num-cpus="$cpus" --num-gpus="$gpus" &
    steps+=($!)
done

# The job waits for nodes that are still starting.
export COLA_CLUSTER_PATIENCE_S=600
until ray job list --address "http://127.0.0.1:$dashboard" >/dev/null 2>&1; do
    kill -0 "${steps[0]}" || exit 1
    sleep 2
done
trap stop TERM INT
# In the background, because bash hears a signal only between commands; `wait` is one that a signal interrupts.
ray job submit --address "http://127.0.0.1:$dashboard" --submission-id "$job" -- \
    python "$folder/jobs/${COLA_JOB:-cotrain}.py" "$@" &
submitted=$!
while true; do
    stopped="" status=0
    wait "$submitted" || status=$?
    [[ -n $stopped ]] || break
done
exit "$status"
