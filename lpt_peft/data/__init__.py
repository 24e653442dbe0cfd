"""Long-tailed data: indices, labels and small datasets. Import the file you need; each names its own extra."""
