"""The model card: a template, and what fills it from a run's results."""
