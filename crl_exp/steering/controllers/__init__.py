"""Controllers: fixed features, vectors, a learned policy; and the observer of stage 1, which adds
nothing.
"""
