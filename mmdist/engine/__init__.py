"""Continuous batching over a paged KV cache: every rank runs the same step, rank 0 decides what is in it."""
