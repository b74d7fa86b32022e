"""What a reader asks first of a steered model: would something simpler have done as well?

A bias on the answer, other words, a probe, a probe that steers, adapted weights, a bag of words: on
the same items, with the same labels, chosen on validation as everything else is.
"""
