"""Checkpoints cut for their ranks ahead of time: `weights_tools split`, `inspect` and `verify`."""
