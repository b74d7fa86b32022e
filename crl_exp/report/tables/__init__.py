"""A sweep's tables, cell by cell, and four ways to lay them out: terminal, Markdown, LaTeX and CSV.

Each further table is one module with its columns, its note and its cells.
"""
