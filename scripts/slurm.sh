#!/usr/bin/env bash
# Several nodes of 8 GPUs under Slurm, a process a GPU; the folder must be on a file system that all nodes share.
#   sbatch --nodes 4 scripts/slurm.sh training/recipes/cluster_1b_t2048.yaml output_dir=runs/1b
# One node without Slurm: .venv/bin/torchrun --nproc_per_node 8 -m training.train RECIPE.yaml [key=value ...]
# A job that is requeued goes on from the last whole checkpoint.
#SBATCH --job-name lnfree
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --output %x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}"

gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun does not take over how many CPUs the job has a task: left out, all processes of a node share one
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$gpus" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$host:29500" \
    -m training.train "$@"
