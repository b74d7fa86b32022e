"""Kinds of experiment. Steering: steered against unsteered answers on the same held-out items."""
