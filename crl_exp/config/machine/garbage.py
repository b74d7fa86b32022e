"""Python's garbage collector, asked to look less often while very many small objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Look for garbage less often, and only among what is made from now on.

    Configs, and the rows that MLflow writes, are so many small objects that Python else goes
    through all those of torch and transformers again and again, for a quarter of a plan's time.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, thresholds[2])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
