"""Results of a long benchmark in a file, a line each, so that it goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.output import progress


class Parts:
    """Results so far, a line of a file each."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self.done: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, key: dict[str, Any], make: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """The result of a key, made unless it is there."""
        for one in self.done:
            if all(one.get(name) == value for name, value in key.items()):
                return one
        self.done.append({**key, **make(*args)})
        progress(json.dumps(self.done[-1]))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[-1]) + "\n")
        return self.done[-1]
