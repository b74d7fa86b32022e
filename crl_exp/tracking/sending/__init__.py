"""What sending a run directory to MLflow takes: the client, its runs, requests of a size that it
takes, and what of a run was sent.
"""
