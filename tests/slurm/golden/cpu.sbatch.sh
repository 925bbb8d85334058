#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --job-name=train_cpu
#SBATCH --mem=2000M
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/%j_0_log.out
#SBATCH --partition=cpu
#SBATCH --time=30

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/job.sh
