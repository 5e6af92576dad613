#!/bin/bash
#SBATCH --job-name={{ name }}
#SBATCH --output={{ name }}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{ cpus }}
#SBATCH --mem={{ memory }}
#SBATCH --gpus-per-node={{ gpus? }}
#SBATCH --time={{ minutes }}
#SBATCH --partition={{ partition? }}
#SBATCH --account={{ account? }}
#SBATCH --requeue
# This starts Ray on every node of the allocation, then one command on the first of them. A requeued job runs the same
# command with the same --out, which goes on where it was, and appends to the same log.
{{ setup? }}
set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # Slurm kills what takes longer than 30 s to end, Ray's own default.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"  # It is on each node, and its name is short because it holds sockets.
export port=$((10000 + SLURM_JOB_ID % 5000 * 4))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${nodes[0]}:$port"

# `ray_on NODES COUNT ARGUMENTS...` runs Ray on these nodes until it is ended; then nothing of it is left there.
# (`ray stop` would also end the Ray of other jobs on a node.)
ray_on() {
    local list=$1 count=$2
    shift 2
    exec srun --overlap --kill-on-bad-exit=0 --nodelist="$list" --nodes="$count" --ntasks="$count" \
        --ntasks-per-node=1 --cpus-per-task={{ cpus }} bash -c '
            mkdir -p -m 700 "$RAY_TMPDIR"
            [[ -O "$RAY_TMPDIR" ]] || { echo "$RAY_TMPDIR: somebody else made it" >&2; exit 1; }
            ray start --block --num-cpus={{ cpus }} --num-gpus={{ gpus }} --object-store-memory=500000000 \
                --dashboard-agent-listen-port="$((port + 2))" --min-worker-port=0 --max-worker-port=0 "$@" &
            trap "kill $! 2>/dev/null; wait; rm -rf \"$RAY_TMPDIR\"" EXIT
            trap "exit 143" TERM
            wait "$!"
        ' ray "$@"
}

started=()
finish() {
    trap - EXIT TERM
    if ((${#started[@]})); then
        kill "${started[@]}" 2>/dev/null || true
        wait "${started[@]}" || true
    fi
}
trap finish EXIT
trap 'exit 143' TERM

ray_on "${nodes[0]}" 1 --head --port="$port" --ray-client-server-port="$((port + 1))" --include-dashboard=false &
started+=("$!")
nested-ats job nodes --address "$address" --wait 1 --timeout {{ start_s }}
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    ray_on "$others" "$((${#nodes[@]} - 1))" --address="$address" &
    started+=("$!")
    nested-ats job nodes --address "$address" --wait "${#nodes[@]}" --timeout {{ start_s }}
fi

export RAY_ADDRESS="$address"
# The command runs in the background, so that a SIGTERM reaches this shell at once.
{{ command }} &
started+=("$!")
code=0
wait "$!" || code=$?
exit "$code"
