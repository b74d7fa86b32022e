"""Stage 2: a policy over the SAE's features for each layer, and how it learns (PPO, GRPO)."""
