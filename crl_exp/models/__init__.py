"""Language models: which one, loading it, its decoder's layers, what is fed to it.

Any architecture of transformers that builds decoder layers in a list is taken as it is; nothing
here knows of SAEs or steering.
"""
