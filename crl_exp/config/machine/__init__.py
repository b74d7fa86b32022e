"""What of an experiment lies on this machine: fetched assets, the hub's cache, devices."""
