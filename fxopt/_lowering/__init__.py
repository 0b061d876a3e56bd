"""How the graph is walked to make rows; private to :mod:`fxopt.lowering`."""
