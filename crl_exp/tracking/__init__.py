"""Run directories brought to MLflow or wandb, before, during and after a run, as often as one
likes.

`sending` brings them to MLflow: `content` says what it is given, `upload` sends what wasn't sent
yet. `to_wandb` brings them to wandb. `sync` is the command, `live` what a run holds. Either may be
away: nothing of a run hangs on it.
"""
