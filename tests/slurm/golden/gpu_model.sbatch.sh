#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --cpus-per-task=16
#SBATCH --gpus=a100:4
#SBATCH --job-name=train_gpu_model
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/0.log
#SBATCH --time=120

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/batch.sh
