"""Make predictions, measures, heatmaps and reports with a model."""
