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
#SBATCH --output=/study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/%j_0_log.out
#SBATCH --partition=a100,v100
#SBATCH --qos=short

# command
export SUBMITIT_EXECUTOR=slurm
exec bash /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/job.sh
