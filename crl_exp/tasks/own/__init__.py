"""A user's own questions and rewards: kinds of answers, sizes as shares, functions, a judge."""
