"""``python -m fxopt``: the command, where its script is not on the path."""

import sys

from fxopt.cli import main

sys.exit(main())
