"""``moetrain eval``: a trained model on files, and on tasks of lm-eval."""
