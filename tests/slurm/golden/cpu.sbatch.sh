#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --job-name=train_cpu
#SBATCH --mem=2000M
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/0.log
#SBATCH --partition=cpu
#SBATCH --time=30

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/batch.sh
