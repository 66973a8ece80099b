"""Training, evaluation and prediction: settings, runs, checkpoints and reports."""
