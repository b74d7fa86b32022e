"""A sweep's tables, cell by cell, and as LaTeX and CSV; `terminal` and `page` lay out the others.

Each further table is one module with its columns, its note and its cells.
"""
