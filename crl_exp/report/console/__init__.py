"""What is printed of finished runs: tables, one run's answers, two runs side by side."""
