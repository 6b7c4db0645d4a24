"""Text for calibration and evaluation, and the batches that it is cut into."""
