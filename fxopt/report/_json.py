"""Reports to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from fxopt.errors import FxoptError
from fxopt.report._data import Report

__all__ = ["SCHEMA", "from_json", "to_data", "to_json"]

SCHEMA = 1


def to_json(report: Report) -> str:
    """The report as JSON. Numbers that are not finite are written as strings, which JSON has no other way for."""
    return json.dumps(to_data(report), indent=1, allow_nan=False)


def to_data(report: Report) -> dict[str, Any]:
    """The report as plain data, numbers that are not finite as strings."""
    return {"schema": SCHEMA, **_encode(report)}


def from_json(text: str) -> Report:
    """The report in ``text``.

    Raises:
        FxoptError: If the text is no report, or one of another schema version.
    """
    try:
        data = json.loads(text)
    except ValueError as failure:
        raise FxoptError(f"This is no report: {failure}. Give a report.json that fxopt wrote.") from failure
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise FxoptError(f"This report has schema {found!r}; this fxopt reads schema {SCHEMA}.")
    try:
        return typing.cast(Report, _decode(Report, data))
    except (KeyError, TypeError, ValueError) as failure:
        raise FxoptError(f"This report is damaged: {type(failure).__name__}: {failure}.") from failure


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _decode(kind: Any, data: Any) -> Any:
    """``data`` as what the annotation ``kind`` says."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        # What came later has a default: reports written before it can be read.
        present = [
            field for field in dataclasses.fields(kind) if field.name in data or field.default is dataclasses.MISSING
        ]
        return kind(**{field.name: _decode(hints[field.name], data[field.name]) for field in present})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if data is None else _decode(next(arg for arg in args if arg is not types.NoneType), data)
    if origin is tuple:
        inner = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple(_decode(one, item) for one, item in zip(inner, data, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _decode(args[1], item) for key, item in data.items()}
    if kind in (float, int, str):
        return kind(data)
    return data
