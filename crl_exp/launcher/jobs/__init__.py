"""Jobs: handed to SLURM or to processes of this machine, followed, and what each of them runs."""
