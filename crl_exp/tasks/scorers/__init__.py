"""What an answer is worth. A scorer's name goes into the result, so that no metric is swapped."""
