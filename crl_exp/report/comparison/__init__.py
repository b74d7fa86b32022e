"""Runs of a sweep side by side: seeds put together, rows paired by item, features set against each
other, a ladder's steps. Numbers only; `report.tables` and `report.figures` show them.
"""
