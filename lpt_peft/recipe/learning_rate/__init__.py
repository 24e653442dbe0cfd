"""Learning-rate range test: the steps, the curve with its suggestion, and the picture."""
