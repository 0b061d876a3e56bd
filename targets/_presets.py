"""Targets described by TOML files: reading, checking, and the target made of one.

A file that is wrong in any way is refused with its path, the line and the reason.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np

from fxopt.decisions import Capabilities, Placement
from fxopt.errors import FxoptError, TargetError, UnknownNameError
from fxopt.targets._core import CostModel
from fxopt.targets.base import Status, Target, TargetInfo
from fxopt.targets.models import families, family
from fxopt.targets.parameters import Parameter, ParameterError
from fxopt.targets.rows import FLOAT_BITS, OpKind, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Figure", "Preset", "PresetTarget", "builtin_presets", "find_preset", "modes_of", "read_preset"]

SCHEMA = 1
FOLDER = Path(__file__).parent / "presets"

_T = TypeVar("_T")
_CAPACITIES = frozenset({"memory_capacity", "storage_capacity"})
_SECTIONS = (
    "schema",
    "name",
    "title",
    "family",
    "fuses",
    "calibration",
    "capabilities",
    "energy",
    "sources",
    "parameters",
    "modes",
)
_MODE_SECTIONS = {"title", "fuses", "calibration", "capabilities", "sources", "parameters"}
_FIGURE = {"value", "unit", "source"}
_HEADER = re.compile(r"^\s*\[+\s*(?P<path>[^\[\]]+?)\s*\]+\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*(?P<path>(?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True)
class Figure:
    """One number of a preset.

    Attributes:
        value: As the preset writes it, in ``unit``.
        unit: One of :data:`fxopt.targets.parameters.UNITS`.
        source: A key of the preset's sources.
        si: The value in the SI unit.
    """

    value: float
    unit: str
    source: str
    si: float


@dataclass(frozen=True)
class Preset:
    """A checked description of a target.

    Attributes:
        info: What the target says of itself.
        figures: Every figure, by its dotted name below ``parameters``.
        modes: Other ways to run the device that the file describes; each is a target called ``name:mode``.
    """

    info: TargetInfo
    figures: Mapping[str, Figure]
    modes: tuple[str, ...] = ()

    def make_model(self) -> CostModel:
        """The compiled cost model of these figures."""
        values = {key: figure.si for key, figure in self.figures.items()}
        return family(self.info.family).Model(values, self.info.fuses)


class PresetTarget(Target):
    """A target made of a preset.

    Args:
        preset: A checked description, from :func:`read_preset`.
    """

    def __init__(self, preset: Preset) -> None:
        self.preset = preset

    @property
    def info(self) -> TargetInfo:
        """What the target says of itself."""
        return self.preset.info

    @cached_property
    def model(self) -> CostModel:
        """The compiled cost model."""
        return self.preset.make_model()

    def caveats(self, workload: Workload) -> tuple[str, ...]:
        """Why estimates of ``workload`` deserve less trust, or that it does not fit the device at all."""
        found = super().caveats(workload)
        if not _CAPACITIES & self.preset.figures.keys():
            return found
        estimate = self.estimate(workload)
        used = self._figure("storage_used") or 0.0
        needs = (
            ("memory_capacity", "activations at their peak", estimate.peak_activation_bytes),
            ("storage_capacity", "weights and code", estimate.weight_bytes + used),
        )
        for key, what, needed in needs:
            capacity = self._figure(key)
            over = needed > capacity if capacity is not None else np.zeros(0, np.bool_)
            if capacity is not None and over.any():
                share = "" if over.all() else f" (under {over.sum()} of {over.size} policies)"
                most = math.ceil(needed.max() / 1024.0)
                found += (f"does not fit {self.name}: {what} take {most} KiB of {capacity / 1024.0:.0f}{share}.",)
        return found

    def _figure(self, key: str) -> float | None:
        return self.preset.figures[key].si if key in self.preset.figures else None

    def __reduce__(self) -> tuple[type[PresetTarget], tuple[Preset]]:
        """Pickle by the preset: compiled models are made anew."""
        return (PresetTarget, (self.preset,))

    def __repr__(self) -> str:
        return f"<target {self.name}: {self.title}>"


def builtin_presets() -> dict[str, Path]:
    """Paths of the presets that come with fxopt, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find_preset(name: str) -> tuple[Path, str] | None:
    """File and mode of ``name``: a preset or the path of a ``.toml`` file, with or without ``:mode`` behind it."""
    presets = builtin_presets()
    before, _, after = name.rpartition(":")
    for base, mode in ((name, ""), (before, after)):
        if base in presets:
            return presets[base], mode
        if Path(base).suffix == ".toml":
            return Path(base), mode
    return None


def modes_of(path: Path) -> tuple[str, ...]:
    """Names of the modes that a target file describes, besides the one of which it speaks first.

    Raises:
        TargetError: If the file cannot be read or is no TOML.
    """
    return tuple(_parse(path)[1].get("modes", {}))


def read_preset(path: Path, mode: str = "") -> Preset:
    """Read and check a preset.

    Args:
        path: The file.
        mode: One of :func:`modes_of` the file; by default what it says outside of modes.

    Raises:
        UnknownNameError: If there is no such mode.
        TargetError: If the file cannot be read or is wrong; it names the file, the line and the reason.
    """
    text, data = _parse(path)
    return _Reader(path, text, data).preset(mode)


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a target file and the tables in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise TargetError(f"Cannot read target file {path}: {failure}.") from failure
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        raise TargetError(f"{path} is not TOML: {failure}. Correct it there.") from failure


class _Reader:
    """Takes a preset out of parsed TOML, key by key, and knows the lines they stand on."""

    def __init__(self, path: Path, text: str, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.lines = dict(_key_lines(text))

    def fail(self, key: str, reason: str) -> TargetError:
        """The error for ``key``, on the line of it or of the nearest key that holds it."""
        parts = key.split(".")
        holders = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        line = next((self.lines[holder] for holder in holders if holder in self.lines), 1)
        return TargetError(f"{self.path}, line {line}: {key}: {reason}")

    def take(self, table: Mapping[str, Any], key: str, kind: type[_T], where: str = "") -> _T:
        """``table[key]``, which has to be of type ``kind``."""
        full = f"{where}.{key}" if where else key
        if key not in table:
            raise self.fail(full, "is missing.")
        value = table[key]
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "a table"}
            raise self.fail(full, f"has to be {names.get(kind, 'a list')}, got {value!r}.")
        if value == "":
            raise self.fail(full, "must not be empty.")
        return cast("_T", value)

    def only(self, table: Mapping[str, Any], known: set[str], where: str = "") -> None:
        """Refuse keys that mean nothing."""
        for key in table:
            if key not in known:
                full = f"{where}.{key}" if where else key
                raise self.fail(full, f"is not known here; known: {', '.join(sorted(known))}.")

    def modes(self) -> dict[str, dict[str, Any]]:
        """What each mode puts in the place of what stands outside of modes."""
        modes = self.take(self.data, "modes", dict) if "modes" in self.data else {}
        for name in modes:
            where = f"modes.{name}"
            table = self.take(modes, name, dict, "modes")
            self.only(table, _MODE_SECTIONS, where)
            # What was measured in one mode says nothing of another.
            self.take(table, "title", str, where)
            self.take(table, "calibration", dict, where)
        return modes

    def enter(self, mode: str, changes: Mapping[str, Any]) -> None:
        """Read on as if what ``mode`` changes stood outside of modes, on the lines where it stands."""
        name = f"{self.take(self.data, 'name', str)}:{mode}"
        kept = {key: value for key, value in self.data.items() if key != "calibration"}
        self.data = {**_overlaid(kept, changes), "name": name}
        prefix = f"modes.{mode}."
        within = {key.removeprefix(prefix): line for key, line in self.lines.items() if key.startswith(prefix)}
        self.lines = {**self.lines, **within}

    def preset(self, mode: str = "") -> Preset:
        """The whole preset, checked; its model is made once to see that the figures fit together."""
        self.only(self.data, set(_SECTIONS))
        modes = self.modes()
        if mode and mode not in modes:
            raise UnknownNameError(f"mode of {self.take(self.data, 'name', str)}:", mode, modes)
        if mode:
            self.enter(mode, modes[mode])
        schema = self.take(self.data, "schema", int)
        if schema != SCHEMA:
            raise self.fail("schema", f"is {schema}; this version of fxopt reads schema {SCHEMA}.")
        name = self.take(self.data, "family", str)
        if name not in families():
            raise self.fail("family", f"{name!r} is not known; known: {', '.join(families())}.")
        sources = self.take(self.data, "sources", dict)
        for key in sources:
            self.take(sources, key, str, "sources")
        figures = dict(self.figures(family(name).PARAMETERS, sources))
        preset = Preset(self.info(name, sources), figures, tuple(modes))
        try:
            model = preset.make_model()
        except ParameterError as error:
            raise self.fail(f"parameters.{error.key}", error.reason) from error
        return replace(preset, info=replace(preset.info, energy_reason=self.energy_reason(model)))

    def info(self, family_name: str, sources: dict[str, str]) -> TargetInfo:
        """Everything but the figures."""
        calibration = self.take(self.data, "calibration", dict)
        self.only(calibration, {"status", "error", "bits", "ranks_only_bits"}, "calibration")
        status = self.take(calibration, "status", str, "calibration")
        if status not in get_args(Status):
            raise self.fail("calibration.status", f"{status!r} is none of {', '.join(get_args(Status))}.")
        bits = self.widths(calibration, "bits")
        ranks_only_bits = self.widths(calibration, "ranks_only_bits") if "ranks_only_bits" in calibration else ()
        if set(bits) & set(ranks_only_bits):
            raise self.fail("calibration.ranks_only_bits", f"has to be apart from bits, {bits}, got {ranks_only_bits}.")
        return TargetInfo(
            name=self.take(self.data, "name", str),
            title=self.take(self.data, "title", str),
            family=family_name,
            fuses=self.take(self.data, "fuses", bool),
            status=cast("Status", status),
            error=self.take(calibration, "error", str, "calibration"),
            calibrated_bits=bits,
            ranks_only_bits=ranks_only_bits,
            capabilities=self.capabilities(),
            energy_reason="",
            sources=sources,
        )

    def widths(self, calibration: Mapping[str, Any], key: str) -> tuple[int, ...]:
        """A list of operand widths of the calibration section."""
        bits = self.take(calibration, key, list, "calibration")
        if not _are_bits(bits):
            raise self.fail(f"calibration.{key}", f"has to list widths from 1 to {FLOAT_BITS}, got {bits!r}.")
        return tuple(bits)

    def capabilities(self) -> Capabilities:
        """The capabilities section."""
        table = self.take(self.data, "capabilities", dict)
        self.only(table, {"bits", "channel_tile", "batch", "operators", "placement"}, "capabilities")
        bits = self.take(table, "bits", dict, "capabilities")
        self.only(bits, {"*", *(kind.name.lower() for kind in OpKind)}, "capabilities.bits")
        operators = self.take(table, "operators", list, "capabilities") if "operators" in table else None
        if operators is not None and not all(isinstance(name, str) for name in operators):
            raise self.fail("capabilities.operators", f"has to list names of operators, got {operators!r}.")
        pairs = {kind: self.bit_pairs(bits, kind) for kind in bits}
        channel_tile = self.take(table, "channel_tile", int, "capabilities")
        batch = self.take(table, "batch", int, "capabilities")
        placement = self.placement(table)
        try:
            return Capabilities(pairs, channel_tile, None if operators is None else tuple(operators), batch, placement)
        except FxoptError as error:
            raise self.fail("capabilities", str(error)) from error

    def placement(self, capabilities: Mapping[str, Any]) -> Placement:
        """What the target asks of quantized graphs."""
        where = "capabilities.placement"
        table = self.take(capabilities, "placement", dict, "capabilities") if "placement" in capabilities else {}
        self.only(table, {field.name for field in fields(Placement)}, where)
        given = {key: tuple(self.take(table, key, list, where)) for key in table}
        for key, options in [*((f"{where}.{key}", {key: value}) for key, value in given.items()), (where, given)]:
            try:
                placement = Placement(**options)
            except TargetError as error:
                raise self.fail(key, str(error)) from error
        return placement

    def bit_pairs(self, table: Mapping[str, Any], kind: str) -> tuple[tuple[int, int], ...]:
        """The allowed pairs of weight and activation bits of one kind of operator."""
        pairs = self.take(table, kind, list, "capabilities.bits")
        if not pairs or not all(isinstance(pair, list) and len(pair) == 2 and _are_bits(pair) for pair in pairs):
            raise self.fail(
                f"capabilities.bits.{kind}",
                f"has to list pairs of weight and activation bits from 1 to 32, got {pairs!r}.",
            )
        return tuple((pair[0], pair[1]) for pair in pairs)

    def figures(self, known: Mapping[str, Parameter], sources: Mapping[str, str]) -> Iterator[tuple[str, Figure]]:
        """Every figure, checked and converted."""
        found = dict(_leaves(self.take(self.data, "parameters", dict)))
        for key, table in found.items():
            where = f"parameters.{key}"
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.0)
                raise self.fail(where, f"is no figure of this family, which takes {', '.join(near)} and the like.")
            if not isinstance(table, dict):
                raise self.fail(where, "has to be { value = ..., unit = ..., source = ... }.")
            self.only(table, _FIGURE, where)
            value = self.take(table, "value", float, where)
            unit = self.take(table, "unit", str, where)
            source = self.take(table, "source", str, where)
            if source not in sources:
                raise self.fail(where, f"source {source!r} is not among [sources]: {', '.join(sources)}.")
            try:
                yield key, Figure(value, unit, source, known[key].to_si(key, value, unit))
            except ParameterError as error:
                raise self.fail(where, error.reason) from error
        for key, parameter in known.items():
            if parameter.required and key not in found:
                raise self.fail(f"parameters.{key}", f"is missing ({parameter.about}).")

    def energy_reason(self, model: CostModel) -> str:
        """Why there is no energy: told by the file exactly where there is none."""
        table = self.take(self.data, "energy", dict) if "energy" in self.data else {}
        self.only(table, {"unavailable"}, "energy")
        if model.has_energy and table:
            raise self.fail("energy", "says that energy is unavailable, but there are energy figures.")
        return "" if model.has_energy else self.take(table, "unavailable", str, "energy")


def _overlaid(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with what ``changes`` says in its place; a figure is changed as a whole."""
    result = dict(base)
    for key, value in changes.items():
        is_table = isinstance(value, dict) and isinstance(result.get(key), dict) and not _FIGURE & value.keys()
        result[key] = _overlaid(result[key], value) if is_table else value
    return result


def _are_bits(values: list[Any]) -> bool:
    return all(type(value) is int and 1 <= value <= FLOAT_BITS for value in values)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of what lies in nested tables, down to the tables that look like figures."""
    for key, value in table.items():
        if isinstance(value, dict) and not _FIGURE & value.keys():
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _key_lines(text: str) -> Iterator[tuple[str, int]]:
    """Dotted path and line of every key and table header of a valid TOML text."""
    table = ""
    in_text = False
    for number, line in enumerate(text.splitlines(), start=1):
        starts_in_text = in_text
        in_text ^= (line.count('"""') + line.count("'''")) % 2 == 1
        header = None if starts_in_text else _HEADER.match(line)
        entry = None if starts_in_text else _KEY.match(line)
        if header:
            table = _plain(header["path"])
            yield table, number
        elif entry:
            yield (f"{table}." if table else "") + _plain(entry["path"]), number


def _plain(path: str) -> str:
    return re.sub(r"\s*\.\s*", ".", path.replace('"', "").replace("'", ""))
