"""Weights of other implementations: fetched, read without running anything of a file, and written."""
