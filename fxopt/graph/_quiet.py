"""torch's own log messages, kept from the terminal where an error of ours says it all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_loggers"]

_NOISY_LOGGERS = (
    "torch._export",
    "torch._export.non_strict_utils",
    "torch._subclasses.fake_tensor",
    "torch.export",
    "torch.export._trace",
    "torch.fx.experimental.symbolic_shapes",
)


@contextlib.contextmanager
def quiet_loggers() -> Iterator[None]:
    """Silence what torch logs while it exports and computes shapes."""
    loggers = [(logger, logger.disabled) for logger in map(logging.getLogger, _NOISY_LOGGERS)]
    try:
        for logger, _ in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in loggers:
            logger.disabled = disabled
