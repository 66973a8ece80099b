#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, and goes on after its time limit, a preemption or the loss of a node.
# README.md beside this file shows the command.

#SBATCH --job-name=detr-fast
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

set -euo pipefail

: "${DATA:?must be a data set on storage that all nodes share: a folder, shards or a URL}"
: "${STAGE_TO?must be a folder on the own disk of each node, to which DATA is copied first, or empty for no copy}"
: "${OUTPUT:?must be the folder of the run, on storage that all nodes share}"
: "${MAX_RESTARTS:?must be how often torchrun starts failed processes again, 3 for example}"
: "${SLURM_JOB_ID:?is missing: submit this script with sbatch}"
: "${SLURM_GPUS_ON_NODE:?is missing: ask for GPUs with sbatch --gpus-per-node=COUNT}"
: "${SLURM_CPUS_PER_TASK:?is missing: ask for the cores of a node with sbatch --cpus-per-task=COUNT}"

# Less than the 180 seconds above. torchrun reads it from here; one that does not know the option yet kills after 30.
export PET_SHUTDOWN_TIMEOUT=150
# Processes that torchrun starts again must not find the addresses of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
each_node=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1)

# Runs a step on all nodes to its end, whatever signals arrive; its exit code is in status.
run_step() {
    "${each_node[@]}" "$@" &
    local step=$!
    status=0
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # it was a signal that ended the wait
        status=0
        wait "$step" || status=$?
    done
}

status=0 is_expiring=false was_stopped=false
# A signal to srun would kill its tasks at once; scancel lets the processes of every step have it, which save and end.
trap 'is_expiring=true was_stopped=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm sends this one to the steps as well; the script stays to pass on their exit code.
trap was_stopped=true TERM

data="$DATA"
if [[ -n $STAGE_TO ]]; then
    # A file appears when it is whole: half a file would be newer than its source, and never be copied again.
    # shellcheck disable=SC2016 # the inner shells expand them
    copy='for file in "${@:2}"; do
        [[ $file -nt $1/$file ]] || continue
        part="$1/$file.part.$SLURM_JOB_ID"
        cp -- "$file" "$part" && mv -- "$part" "$1/$file" || exit 255
    done'
    # shellcheck disable=SC2016
    stage='set -euo pipefail
        mkdir -p "$2"
        to="$(realpath "$2")"
        cd "$1"
        find -L . -type d -print0 | (cd "$to" && xargs -0 mkdir -p)
        find -L . -type f -print0 | xargs -0 --no-run-if-empty -n 64 -P 8 bash -c "$3" copy "$to"'
    run_step bash -c "$stage" stage "$DATA" "$STAGE_TO" "$copy"
    data="$STAGE_TO"
fi
if [[ $status -eq 0 && $was_stopped == true ]]; then # there may have been no step to pass it on to
    status=143
fi

if [[ $status -eq 0 ]]; then
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    run_step torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" \
        --nproc-per-node="$SLURM_GPUS_ON_NODE" \
        --max-restarts="$MAX_RESTARTS" \
        --rdzv-backend=c10d \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
        -m detr_fast train "$data" --resume auto --train.output="$OUTPUT" "$@"
fi

# Slurm itself puts a preempted job back only if it had to kill it.
if [[ $status -ne 0 && $is_expiring == false ]]; then
    [[ " $(scontrol show job "$SLURM_JOB_ID")" =~ [[:space:]]PreemptTime=[0-9] ]] && is_expiring=true
fi
if [[ $status -ne 0 && $is_expiring == true ]]; then
    echo "slurm.sh: stopped before the end; putting job $SLURM_JOB_ID back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
