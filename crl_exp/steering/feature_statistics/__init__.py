"""Stage 1: how every feature goes with the reward, measured in one pass and stored for all runs."""
