"""Run directories brought to MLflow, before, during and after a run, as often as one likes.

`content` says what MLflow is given, `upload` sends what wasn't sent yet, `sync` is the command,
`live` the thread of a run. MLflow may be away: nothing of a run hangs on it.
"""
