"""What a sweep found: tables, figures and a page, from its run directories alone.

`comparison` puts runs side by side, `tables` and `figures` show them, `parts` takes apart what
can't be compared, `across` sets sweeps against each other. Without torch: a report is made where
the models aren't.
"""
