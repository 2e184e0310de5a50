#!/bin/bash
# A list of edits, or a sweep, as a job array: one GPU a shard. Submit both with
#
#     array=$(sbatch --parsable examples/slurm.sh batch edits.jsonl -o results)
#     sbatch --array=0 --dependency=afterany:$array examples/slurm.sh batch edits.jsonl -o results
#
# The first makes the shards. The second, an array of one, starts when they have ended, for whatever reason: it
# makes what is missing, and merges. Likewise with `ablate spec.toml -o results`.
#
#SBATCH --job-name=qwenedit
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

# A job that was preempted, or whose node failed, is queued again, and its shard goes on where it was.
count=${SLURM_ARRAY_TASK_COUNT:-1}
shard=()
if [ "$count" -gt 1 ]; then
    shard=(--shard "$SLURM_ARRAY_TASK_ID/$count")
fi
exec qwenedit "$@" "${shard[@]}"
