"""Data sets: explanations of a job, activations, the evaluation set."""
