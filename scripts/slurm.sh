#!/usr/bin/env bash
# Several nodes of 8 GPUs under Slurm, a process a GPU; the folder must be on a file system that all nodes share.
#   sbatch --nodes 4 scripts/slurm.sh training/recipes/cluster_1b_t2048.yaml output_dir=runs/1b
# Where Slurm does not count GPUs, or there are none: PROCESSES_PER_NODE=8 sbatch --gpus-per-node 0 scripts/slurm.sh ...
# One node without Slurm: .venv/bin/torchrun --nproc_per_node 8 --no-python .venv/bin/lnfree train RECIPE [key=value ...]
# A job that is requeued, or submitted again after its time, goes on from the last whole checkpoint.
#SBATCH --job-name lnfree
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --output %x-%j.out
#SBATCH --open-mode append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}"

processes=${SLURM_GPUS_ON_NODE:-${PROCESSES_PER_NODE:?Slurm gave the job no GPUs: set the number of processes of a node}}
threads=$((SLURM_CPUS_PER_TASK / processes))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# two jobs may share a node, but not a port
port=$((20000 + SLURM_JOB_ID % 10000))
# srun does not take over how many CPUs the job has a task: left out, all processes of a node share one. A node that
# fails ends the others, which would wait for it.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" --kill-on-bad-exit \
    .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$processes" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$host:$port" \
    -m training.train "$@"
