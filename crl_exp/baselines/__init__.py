"""What a reader asks first of a steered model: would something simpler have done as well?

Each is a method like any other, on the same items and with the same labels: other wordings and
examples, a bias on the answer, a probe, a probe that steers, adapted weights.
"""
