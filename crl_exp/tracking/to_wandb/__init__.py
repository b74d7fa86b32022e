"""Run directories brought to wandb: each is one wandb run, written whole.

A run of wandb's can't be gone on with offline, and one with the same id takes the place of the one
before. So nothing is added to what was written earlier: while a run goes on, a process beside it
follows its journal into one wandb run; where that was cut off, or the run has changed since, the
next attempt or `sync` writes all of it again under the same id.

`rows` says what wandb is given, `session` is the one module that calls it, `sending` brings a run
directory up to date, `follow` is that process, and `follower` what a run holds of it.
"""
