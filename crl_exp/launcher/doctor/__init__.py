"""`python -m crl_exp doctor`: whether this machine, and the cluster, can run what is typed.

A check is a function from a `Subject` to what it found; `command.CHECKS` lists them. None of them
downloads, submits or changes anything.
"""
