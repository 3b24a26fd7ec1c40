"""task=performance: what is measured, on which ranks, and what is written about it."""
