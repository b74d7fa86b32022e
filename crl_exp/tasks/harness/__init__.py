"""Tasks of the lm-evaluation-harness (`lm_eval`), which is imported only where one is asked for."""
