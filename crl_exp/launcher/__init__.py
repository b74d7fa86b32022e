"""From a sweep to jobs: compose, check, plan, freeze, submit, follow; on SLURM or on this machine.

And the commands that a person types.
"""
