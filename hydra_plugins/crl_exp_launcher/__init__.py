"""`hydra/launcher=slurm` and `hydra/launcher=local_processes`."""
