"""Helpers of several sub-commands."""
