"""Several sweeps side by side: `python -m crl_exp report A B`.

`matching` finds the rows that are the same but for what sets the sweeps apart, `asked` what differs
between their configs; `compared` pairs those rows item by item. `tables` and `figure` show it.
"""
