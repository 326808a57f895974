#!/usr/bin/env bash
# `mwm localize` on SLURM: this job holds a Dask scheduler and the run; its workers are an array of jobs of their own,
# which may start late, be pre-empted and come back. Both scripts lie in one folder:
#
#   cd "$(python -c 'import pipelines; print(pipelines.__path__[0])')/clusters"
#   RECIPE=/shared/recipe.yaml IMAGES=/shared/images OUT=/shared/runs/regions WORKERS=64 sbatch slurm.sh
#
# A Dask scheduler lets whoever reaches its port run code as you, on your data: use it inside of a network that you
# trust, or give scheduler, workers and client certificates (distributed.comm.tls in Dask's own configuration).
#
# RECIPE is a file ('mwm init' writes one) with "localize" settings, its regions among them; IMAGES and OUT lie where every node finds them under the same
# path, and so does a recipe's folder of weights. MORE holds further options, such as MORE="--set max_failures=100".
# What runs when: one task is one shard (at most 1024 images), so more workers than shards are of no use.
# More or fewer workers at any time: sbatch --array=1-32 slurm_worker.sh with the same OUT; scancel takes them away.
# A run on GPUs: see slurm_worker.sh; this job then needs one too, for it builds the models once to check the recipe.
# DICOM: set MWM_SALT_FILE to a file of the user's, outside of OUT; sbatch passes it on.
#
#SBATCH --job-name=mwm-localize
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=48:00:00
# Two minutes before the time is over this script gets SIGTERM: the run keeps what is finished and ends with 75.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${RECIPE:?a recipe, by name or file}" "${IMAGES:?a folder or list of images}" "${OUT:?the folder of the run}"
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")" && pwd)}
export OUT OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
SCHEDULER_FILE=$(realpath -m "$OUT").scheduler.json
export SCHEDULER_FILE
rm -f "$SCHEDULER_FILE"

dask scheduler --port 0 --no-dashboard --scheduler-file "$SCHEDULER_FILE" &
scheduler=$!
until [ -s "$SCHEDULER_FILE" ]; do
    kill -0 "$scheduler" # ends the script where the scheduler could not start
    sleep 1
done
workers=$(sbatch --parsable --export=ALL --array="1-${WORKERS:-16}" "$here/slurm_worker.sh")

# What has been finished, as one number: sizes of the journals, which shards are done, whether all are.
finished() {
    { find "$OUT" -maxdepth 2 \( -name '*.rows' -o -name '*.done' -o -path "$OUT/run/regions.json" \) \
        -printf '%s %p\n' 2>/dev/null || true; } | sort | cksum
}
before=$(finished)

# shellcheck disable=SC2086 # MORE is several words
mwm localize "$RECIPE" --images "$IMAGES" --out "$OUT" --scheduler "$SCHEDULER_FILE" ${MORE:-} &
run=$!
told=
trap 'told=1; kill -TERM "$run" 2>/dev/null || true' TERM INT
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # a signal has ended the wait, not the run
    code=0
    wait "$run" || code=$?
done
scancel "$workers" || true
kill "$scheduler" 2>/dev/null || true
wait "$scheduler" 2>/dev/null || true
rm -f "$SCHEDULER_FILE"
if [ "$code" = 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    if [ -n "$told" ] || [ "$(finished)" != "$before" ]; then
        scontrol requeue "$SLURM_JOB_ID" # the same command continues
    else # a disk that is full, workers without memory: once more would end the same
        echo "not queued again: nothing was finished this time, and it says above why" >&2
    fi
fi
exit "$code"
