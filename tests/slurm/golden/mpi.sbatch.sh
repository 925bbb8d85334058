#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --job-name=train_mpi
#SBATCH --mem-per-cpu=500M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=16
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/0.log
#SBATCH --time=600

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/batch.sh
