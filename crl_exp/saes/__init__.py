"""Sparse autoencoders: which ones, loading one layer's at its own site, what it says of itself, how
it fits tokens, other dictionaries in its place, lists of its features.

`saes.training` makes them.
"""
