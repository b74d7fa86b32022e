"""A run's directory is the truth: `outputs/SWEEP/RUN_KEY/`.

Its status and heartbeat, what it was started from, its checkpoints, how it is asked to end, what
was read, what each item got. Whoever looks on (status, report, MLflow) reads it from there.
"""
