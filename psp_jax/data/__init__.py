"""Data: builders write records once, sources read them, transforms and the pipeline make batches. Imports no jax."""
