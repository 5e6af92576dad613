"""From slides and labels to a model."""
