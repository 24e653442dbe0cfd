"""Tests of examples/serve.py: a real server, and clients in threads."""
