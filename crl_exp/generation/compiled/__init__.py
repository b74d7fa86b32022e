"""`engine.decode=compiled`: one decoding step captured as a graph, for GPUs."""
