"""What every other part may use and that knows none of them.

Errors for people, sections made into objects, the keys that tell runs apart, what an earlier
version's config means now, where things lie. No torch here: `launch.py --help` and a refused typo
come as far as this and no further.
"""
