"""``python -m fxopt``: the command, where its script is not on the path."""

from fxopt.cli import main

main()
