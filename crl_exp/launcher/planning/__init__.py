"""What a sweep would do, before anything starts: its points, faults, packs, time and power."""
