"""From a sweep to jobs: compose, check, plan, freeze, submit, follow; on SLURM or on this machine.

Below it nothing knows Hydra or submitit: a job is `python -m crl_exp run RUN_DIRECTORY`, which runs
the config frozen there.
"""
