"""`python -m mmdist`: the same as the installed command."""

from mmdist.cli import program

program()
