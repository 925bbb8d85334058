#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --clusters=one
#SBATCH --constraint='nvlink&(ib|roce)'
#SBATCH --gres=gpu:1,tmp:20G
#SBATCH --job-name=train_all_options
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=/study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/0.log
#SBATCH --partition=a100,v100
#SBATCH --qos=short

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/batches/fedcba9876543210/batch.sh
