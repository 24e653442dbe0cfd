"""Image files on disk: readable formats, decoding to RGB, and class folders."""
