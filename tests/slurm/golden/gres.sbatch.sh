#!/bin/bash

# Parameters
#SBATCH --cpus-per-gpu=8
#SBATCH --gres=gpu:a100:2
#SBATCH --job-name=train_gres
#SBATCH --mem=32000M
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/0.log
#SBATCH --partition=a100
#SBATCH --time=120

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/batch.sh
