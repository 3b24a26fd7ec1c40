"""Parallel layers: each states how its parameters are cut and calls its own collectives."""
