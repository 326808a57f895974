#!/usr/bin/env bash
# Workers of slurm.sh, which submits them as an array; each is one process of one thread.
#
# They may be pre-empted: SIGTERM makes a worker finish its micro-batch and go; if the machine is taken earlier, the
# rows finished so far are kept, the images at hand are done again elsewhere and are not suspected of anything. With
# --requeue the job comes back and joins the same scheduler, as long as there is one.
#
#SBATCH --job-name=mwm-worker
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A site's partition of pre-emptible machines:
##SBATCH --partition=preemptible
# A GPU a worker, where the recipe's parts have device: cuda (SLURM then sets CUDA_VISIBLE_DEVICES for each):
##SBATCH --gpus=1
set -euo pipefail
: "${OUT:?the folder of the run}"
scheduler=${SCHEDULER_FILE:-$(realpath -m "$OUT").scheduler.json}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# srun makes it a job step: steps get SIGTERM before a pre-emption, batch scripts do not.
exec srun --ntasks=1 dask worker --scheduler-file "$scheduler" --nthreads 1 --nworkers 1 --no-dashboard \
    --death-timeout 600 --local-directory "${TMPDIR:-/tmp}"
