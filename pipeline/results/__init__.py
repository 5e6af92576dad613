"""What is made with a model: predictions, measures, heatmaps and reports."""
