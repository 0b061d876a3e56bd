"""The measured host: its sweep, its table on disk, its fit, and what it says without a profiler."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (process pools send targets that way)
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import TargetError
from fxopt.targets import HostTarget, OpKind, Workload, load, make_row
from fxopt.targets import rows as r
from fxopt.targets._fit import families_of, fit, held_out_errors
from fxopt.targets._sweep import calibration_sweep, pace_row
from fxopt.targets._table import MeasurementTable, cache_folder, distinct
from fxopt.targets.rows import Floats, Rows
from tests.targets.oracle import conv, random_rows, workload


class Stopwatch:
    """A profiler of an imaginary machine that is linear but for strides; it counts what it is asked, the pace apart.

    Args:
        fail_after: Operators after which it is interrupted.
        blind: Kinds that it cannot run.
        pace: How much slower the machine is at each call than at its best, over and over.
    """

    def __init__(
        self, fail_after: int | None = None, blind: tuple[OpKind, ...] = (), pace: tuple[float, ...] = (1.0,)
    ) -> None:
        self.asked = self.calls = 0
        self.fail_after = fail_after
        self.blind = blind
        self.pace = pace

    def __call__(self, rows: Rows) -> Floats:
        if self.asked == self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(rows) - 3
        self.calls += 1
        seconds = seconds_of(rows) * self.pace[self.calls % len(self.pace)]
        return np.where(np.isin(rows["kind"], self.blind), np.nan, seconds)


def seconds_of(rows: Rows) -> Floats:
    per_mac = np.where(r.compute_bits(rows) <= 8, 2e-11, 6e-11)
    moved = r.in_elements(rows) + r.out_elements(rows)
    strided = (rows["stride_h"] > 1) & (rows["kind"] != OpKind.POOL)
    return (4e-6 + r.macs(rows) * per_mac + moved * 2e-10) * np.where(strided, 1.5, 1.0)


SWEEP = len(calibration_sweep())


NETWORK = workload(
    conv(3, 16, 32, 3, 2),
    make_row(OpKind.NORM, c=16, k=16, in_h=32, in_w=32, out_h=32, out_w=32, fused=1),
    conv(16, 16, 32, 3, groups=16),
    conv(16, 48, 32),
    conv(48, 48, 16, 3, 2, groups=48),
    make_row(OpKind.SOFTMAX, c=48, k=48, in_h=16, in_w=16, out_h=16, out_w=16),
    make_row(OpKind.LINEAR, c=48, k=10, bias=1),
    make_row(OpKind.UNKNOWN, c=10, k=10),
)
COSTED = NETWORK.rows[0][(NETWORK.rows[0]["fused"] == 0) & (NETWORK.rows[0]["kind"] != OpKind.UNKNOWN)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    # Hundreds of small files: what a disk takes to be sure is not under test.
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def small_sweep(monkeypatch: pytest.MonkeyPatch, no_sync: None) -> Rows:
    sweep = calibration_sweep()[::9]
    monkeypatch.setattr("fxopt.targets.host.calibration_sweep", lambda: sweep)
    return sweep


def table_rows(folder: Path) -> list[list[float]]:
    (path,) = folder.glob("host-*.json")
    return json.loads(path.read_text())["rows"]


def test_the_sweep_covers_kinds_and_widths_with_sound_rows() -> None:
    sweep = calibration_sweep()
    assert len(workload(sweep)) == len(distinct(sweep)) > 300
    without = {
        32: {OpKind.EMBEDDING, OpKind.UNKNOWN},
        8: {OpKind.EMBEDDING, OpKind.UNKNOWN, OpKind.NORM, OpKind.SOFTMAX},
    }
    for bits, absent in without.items():
        at_width = sweep[sweep["activation_bits"] == bits]
        assert {OpKind(kind) for kind in at_width["kind"]} == set(OpKind) - absent
        assert np.all(r.compute_bits(at_width) == bits)


def test_a_linear_machine_is_found_again(no_sync: None) -> None:
    host = load("host", profiler=Stopwatch(), fingerprint="machine")
    host.prepare(NETWORK)
    estimate = host.estimate(NETWORK)
    assert estimate.uncosted == ("row7",)
    assert estimate.latency_s[0] == pytest.approx(seconds_of(COSTED).sum(), rel=0.02)
    # Other channels in the same families, never measured.
    wider = NETWORK.rows.copy()
    wider["c"][0, 3], wider["k"][0, 3] = 32, 96
    wider = wider[:, 3:4]
    assert host.estimate(Workload(wider, ["x"])).latency_s[0] == pytest.approx(seconds_of(wider[0])[0], rel=0.1)


def test_what_it_says_of_itself(no_sync: None) -> None:
    host = load("host", profiler=Stopwatch(), fingerprint="machine")
    assert (host.name, host.status, host.error) == ("host", "measured", "Nothing measured yet.")
    assert host.capabilities.allowed_bits("conv") == ((32, 32), (8, 8))
    assert host.capabilities.channel_tile == 8
    host.calibrate()
    assert f"Of {SWEEP} operators measured, half predict the other half (" in host.error
    assert f"times of {SWEEP} operators" in host.info.sources["table"]
    estimate = host.estimate(NETWORK)
    assert estimate.energy_j is None
    assert "energy is not" in estimate.energy_reason


def test_nothing_is_measured_twice(small_sweep: Rows) -> None:
    first = Stopwatch()
    host = load("host", profiler=first, fingerprint="machine")
    host.prepare(NETWORK)
    asked = first.asked
    assert asked > len(small_sweep)
    host.prepare(NETWORK)
    assert first.asked == asked
    # Another process: the table is on disk, no profiler needed.
    again = load("host", fingerprint="machine")
    again.prepare(NETWORK)
    np.testing.assert_array_equal(again.estimate(NETWORK).latency_s, host.estimate(NETWORK).latency_s)


def test_a_run_that_is_resumed_sees_what_it_saw(small_sweep: Rows, tmp_path: Path) -> None:
    record = tmp_path / "run" / "measured.json"
    steps = [Workload(NETWORK.rows[:, :count], NETWORK.names[:count]) for count in (2, 4, len(NETWORK.names))]

    def run(stop: int = len(steps)) -> list[float]:
        host = load("host", profiler=Stopwatch(pace=(1.0, 1.5)), fingerprint="machine").recorded(record)
        seen = []
        for step in steps[:stop]:
            host.prepare(step)
            seen += [float(host.estimate(NETWORK).latency_s[0]), host.error]
        return seen

    first = run(2)
    assert len({*first}) == 4
    whole = run()
    assert whole[:4] == first
    assert run() == whole
    record.write_text("nothing")
    with pytest.raises(TargetError, match="Delete it"):
        run()


def test_a_machine_that_is_slower_for_a_while_gives_the_same_times(small_sweep: Rows) -> None:
    steady = load("host", profiler=Stopwatch(), fingerprint="machine")
    # The first call is at pace 1.0, which later ones are put in terms of.
    shared = load("host", profiler=Stopwatch(pace=(3.0, 1.0, 1.7)), fingerprint="shared machine")
    for host in (steady, shared):
        host.prepare(NETWORK)
    np.testing.assert_allclose(shared.estimate(NETWORK).latency_s, steady.estimate(NETWORK).latency_s, rtol=1e-9)


def test_curves_are_measured_though_they_follow_a_layer(small_sweep: Rows) -> None:
    sizes = {"c": 48, "k": 48, "in_h": 1024, "out_h": 1024, "fused": 1}
    curve = workload(conv(3, 48, 32), make_row(OpKind.ELEMENTWISE, activation=2, **sizes))
    clamp = workload(conv(3, 48, 32), make_row(OpKind.ELEMENTWISE, activation=1, **sizes))
    host = load("host", profiler=Stopwatch(), fingerprint="machine")
    host.prepare(curve)
    assert host.estimate(curve).rows.latency_s[0, 1] == pytest.approx(seconds_of(curve.rows[0, 1:])[0], rel=0.05)
    assert host.estimate(clamp).rows.latency_s[0, 1] == 0.0


def test_another_machine_has_another_table(small_sweep: Rows, cache: Path) -> None:
    load("host", profiler=Stopwatch(), fingerprint="machine").prepare(NETWORK)
    other = Stopwatch()
    load("host", profiler=other, fingerprint="other machine").prepare(NETWORK)
    assert other.asked > len(small_sweep)
    assert len([*cache.glob("host-*.json")]) == 2


@pytest.mark.parametrize("stop", [0, 12, 24])
def test_an_interrupted_sweep_goes_on_where_it_stopped(stop: int, small_sweep: Rows, cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load("host", profiler=Stopwatch(fail_after=stop), fingerprint="machine").prepare(NETWORK)
    if stop:
        # What was measured, and the pace.
        assert len(table_rows(cache)) == stop + 1
    rest, whole = Stopwatch(), Stopwatch()
    resumed = load("host", profiler=rest, fingerprint="machine")
    resumed.prepare(NETWORK)
    uninterrupted = load("host", profiler=whole, fingerprint="twin")
    uninterrupted.prepare(NETWORK)
    assert rest.asked == whole.asked - stop
    np.testing.assert_array_equal(resumed.estimate(NETWORK).latency_s, uninterrupted.estimate(NETWORK).latency_s)


def test_only_families_that_are_new_are_measured(small_sweep: Rows) -> None:
    profiler = Stopwatch()
    host = load("host", profiler=profiler, fingerprint="machine")
    host.calibrate()
    before = profiler.asked
    host.prepare(NETWORK)
    after = profiler.asked
    # Each operator but the fused, the unknown and those whose families the sweep has.
    have = families_of(np.concatenate([small_sweep, pace_row()]))
    assert after - before == np.count_nonzero(~np.isin(families_of(COSTED), have)) > 0
    wider = NETWORK.rows.copy()
    wider["k"][0, 3] = 56
    host.prepare(Workload(np.concatenate([wider, NETWORK.rows]), NETWORK.names))
    assert profiler.asked == after


def test_a_family_is_measured_at_four_of_its_sizes_at_most(small_sweep: Rows) -> None:
    profiler = Stopwatch()
    host = load("host", profiler=profiler, fingerprint="machine")
    host.calibrate()
    before = profiler.asked
    host.prepare(workload(*(conv(8, 8 * i, 11) for i in range(1, 10))))
    assert profiler.asked - before == 4


def test_progress_is_told(small_sweep: Rows) -> None:
    heard: list[tuple[int, int, str]] = []
    host = load("host", profiler=Stopwatch(), fingerprint="machine", progress=lambda *news: heard.append(news))
    assert isinstance(host, HostTarget)
    host.calibrate()
    assert [done for done, _, _ in heard] == [*range(1, len(small_sweep) + 1)]
    assert {total for _, total, _ in heard} == {len(small_sweep)}
    assert heard[0][2] == "conv 32->16 at 112x112, kernel 1, stride 1, 32 bits"


def test_operators_that_the_profiler_cannot_run_are_named_and_not_tried_again(small_sweep: Rows) -> None:
    blind = Stopwatch(blind=(OpKind.SOFTMAX,))
    host = load("host", profiler=blind, fingerprint="machine")
    host.prepare(NETWORK)
    asked = blind.asked
    host.prepare(NETWORK)
    assert blind.asked == asked
    assert host.estimate(NETWORK).uncosted == ("row5", "row7")


def test_without_a_profiler_it_says_what_to_do() -> None:
    for host in (load("host"), load("host", fingerprint="machine")):
        with pytest.raises(
            TargetError, match=rf"has to measure {SWEEP} operators of the standard sweep and has no profiler"
        ):
            host.estimate(NETWORK)
        with pytest.raises(TargetError, match="has no profiler"):
            host.prepare(NETWORK)
        assert host.error == "Nothing measured yet."


def test_a_profiler_needs_a_fingerprint() -> None:
    with pytest.raises(TargetError, match="needs a fingerprint"):
        load("host", profiler=Stopwatch())


NONSENSE: dict[str, Callable[[Rows], Floats]] = {
    "negative": lambda rows: np.full(len(rows), -1.0),
    "zero": lambda rows: np.zeros(len(rows)),
    "infinite": lambda rows: np.full(len(rows), np.inf),
    "too many": lambda rows: np.ones(len(rows) + 1),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_of_a_profiler_is_refused(case: str, cache: Path) -> None:
    with pytest.raises(TargetError, match=r"profiler gave .* for (conv 256->256 at 14x14|15 rows)"):
        load("host", profiler=NONSENSE[case], fingerprint="machine").prepare(NETWORK)
    assert not [*cache.glob("host-*.json")]


def test_a_profiler_that_can_run_nothing(small_sweep: Rows) -> None:
    host = load("host", profiler=lambda rows: np.full(len(rows), np.nan), fingerprint="machine")
    with pytest.raises(TargetError, match="could not run a single operator"):
        host.estimate(NETWORK)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"schema": 2, "fields": [], "rows": []}',
        '{"schema": 1, "fields": ["kind"], "rows": [[0, 1.0]]}',
    ],
)
def test_a_broken_table_is_an_error_that_names_the_file(content: str, cache: Path) -> None:
    path = MeasurementTable("machine", cache).path
    cache.mkdir()
    path.write_text(content)
    with pytest.raises(TargetError, match=rf"{path.name} cannot be read .* Delete it"):
        load("host", fingerprint="machine")


def test_a_time_that_is_no_time_breaks_the_table(small_sweep: Rows, cache: Path) -> None:
    load("host", profiler=Stopwatch(), fingerprint="machine").prepare(NETWORK)
    (path,) = cache.glob("host-*.json")
    content = json.loads(path.read_text())
    content["rows"][3][-1] = -1.0
    path.write_text(json.dumps(content))
    with pytest.raises(TargetError, match="cannot be read"):
        load("host", fingerprint="machine")


def test_the_folder_of_tables(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("FXOPT_CACHE_DIR")
    assert cache_folder().name == "fxopt"


def test_distinct_operators_ignore_what_does_not_change_a_time() -> None:
    row = conv(8, 8, 4)
    same = conv(8, 8, 4, fused=1, live_bytes=5.0, weight_density=0.5)
    other = conv(8, 16, 4)
    found = distinct(np.concatenate([row, same, other, row]))
    assert found["k"].tolist() == [8, 16]
    assert found["live_bytes"].tolist() == [0.0, 0.0]


@given(st.integers(0, 2**32 - 1))
def test_families_are_everything_but_channels(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 200)
    twin = rows.copy()
    for field in ("c", "k"):
        twin[field] = rows[field] + rows["groups"]
    twin["live_bytes"] = 1.0
    np.testing.assert_array_equal(families_of(rows), families_of(twin))
    for field in ("out_h", "kernel_w", "stride_h", "n", "inputs", "activation"):
        other = rows.copy()
        other[field] += 1
        assert not np.any(families_of(rows) == families_of(other))


@given(st.integers(0, 2**32 - 1))
def test_fitted_estimates_never_fall_as_channels_grow_by_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sweep = calibration_sweep()
    model = fit(sweep, seconds_of(sweep) * rng.lognormal(0.0, 0.5, len(sweep)))
    rows = np.concatenate([sweep, random_rows(rng, 50)])
    rows = rows[~np.isin(rows["kind"], [OpKind.UNKNOWN])]
    latency = np.empty((2, len(rows)))
    wider = rows.copy()
    # By whole blocks of vector kernels: a rest of channels takes longer than a block.
    for field in ("c", "k"):
        wider[field] += 16 * rows["groups"]
    model.per_row(np.stack([rows, wider]), latency, np.empty_like(latency), np.empty_like(latency))
    assert np.all(latency[1] >= latency[0] * (1.0 - 1e-12))


def test_factors_are_geometric_means_of_their_families() -> None:
    sweep = calibration_sweep()
    seconds = seconds_of(sweep)
    model = fit(sweep, seconds, fuses=False)
    latency = np.empty((1, len(sweep)))
    model.per_row(sweep.reshape(1, -1), latency, np.empty_like(latency), np.empty_like(latency))
    ratios = np.log(seconds / latency[0])
    keys = families_of(sweep)
    for key in np.unique(keys):
        assert np.mean(ratios[keys == key]) == pytest.approx(0.0, abs=1e-9)


def test_held_out_error_is_small_on_a_linear_machine_and_large_on_noise() -> None:
    sweep = calibration_sweep()
    plain = sweep[(sweep["stride_h"] == 1) & (sweep["kind"] != OpKind.POOL)]
    assert np.quantile(held_out_errors(plain, seconds_of(plain)), 0.9) < 0.02
    noise = np.random.default_rng(0).lognormal(0.0, 1.5, len(plain))
    assert np.median(held_out_errors(plain, seconds_of(plain) * noise)) > 0.3
    assert held_out_errors(plain[:3], seconds_of(plain[:3])).size == 0


def test_the_host_survives_pickling(small_sweep: Rows) -> None:
    host = load("host", profiler=Stopwatch(), fingerprint="machine")
    host.prepare(NETWORK)
    copy = pickle.loads(pickle.dumps(host))
    np.testing.assert_array_equal(copy.estimate(NETWORK).latency_s, host.estimate(NETWORK).latency_s)
    assert repr(copy) == repr(host)
