"""What all suites say when something is not as it should be."""

from __future__ import annotations

__all__ = ["expect"]


def expect(condition: bool, message: str) -> None:
    """Fail the test with ``message`` unless ``condition`` holds; ``assert`` would be gone under ``python -O``."""
    if not condition:
        raise AssertionError(message)
