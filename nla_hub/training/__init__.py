"""Training: a recipe, data with labels, AR regression, AV supervised fine-tuning, export."""
