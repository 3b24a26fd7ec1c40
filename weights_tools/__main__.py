"""`python -m weights_tools`: the same as the console script."""

from weights_tools.cli import program

program()
