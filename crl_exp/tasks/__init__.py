"""What is asked, and how an answer is scored: items in disjoint splits, a prompt and a target each.

A task is one class and one YAML file in `conf/task/`. `tasks.data` reads and draws, `tasks.scorers`
score.
"""
