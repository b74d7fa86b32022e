"""Plugins that Hydra finds by itself."""
