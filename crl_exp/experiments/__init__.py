"""What a run does, from its config to its result, and what the runs of one process share.

`config` makes the objects, `workspace` is what methods work with, `run` goes through the steps,
`packing` plays several runs in one batch.
"""
