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

data="$DATA"
if [[ -n $STAGE_TO ]]; then
    # shellcheck disable=SC2016 # the inner shell expands them
    "${each_node[@]}" bash -c 'mkdir -p "$2" && cp --recursive --update "$1/." "$2"' stage "$DATA" "$STAGE_TO"
    data="$STAGE_TO"
fi

# A signal to srun would kill its tasks at once; scancel lets the processes of every step have it, which save and end.
is_expiring=false
trap 'is_expiring=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm sends this one to the steps as well; the script stays to pass on their exit code.
trap true TERM

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
"${each_node[@]}" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --max-restarts="$MAX_RESTARTS" \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
    -m detr_fast train "$data" --resume auto --train.output="$OUTPUT" "$@" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # it was a signal that ended the wait
    status=0
    wait "$step" || status=$?
done

# Slurm itself puts a preempted job back only if it had to kill it.
if [[ $status -ne 0 && $is_expiring == false ]]; then
    [[ " $(scontrol show job "$SLURM_JOB_ID")" =~ [[:space:]]PreemptTime=[0-9] ]] && is_expiring=true
fi
if [[ $status -ne 0 && $is_expiring == true ]]; then
    echo "slurm.sh: stopped before the end; putting job $SLURM_JOB_ID back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
