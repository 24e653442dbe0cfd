"""Inspection of data sets before training: a summary, and a check of every image."""
