from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from fxopt.errors import FxoptError
from fxopt.report import BudgetLine, Report
from fxopt.report._summary import summary
from tests.report.samples import layer, metrics, report


def test_tables_of_steps_and_of_what_is_slow() -> None:
    made = Report.from_json((Path(__file__).parent / "story.json").read_text(encoding="utf-8"))
    steps, slow = table_text(made.steps_table()), table_text(made.slow_table(most=3))
    assert [name in steps for name in ("original", "fine-tune quantized", "-33.5%")] == [True] * 3
    assert [one.site in slow for one in made.slow[:4]] == [True, True, True, False]
    assert slow.count("lower resolution") == 1
    assert slow.count("as above") == 2
    unknown = tuple(dataclasses.replace(one, bound="", remedy="") for one in made.slow)
    assert "as above" not in table_text(dataclasses.replace(made, slow=unknown).slow_table())


def table_text(table: Table) -> str:
    return " ".join(str(cell) for column in table.columns for cell in column.cells)


floats = st.floats(allow_nan=False)
scores = st.none() | floats


@given(title=st.text(), accuracy=scores, macs=floats, curve=st.lists(scores, max_size=4).map(tuple), seed=st.integers())
def test_json_round_trip(title: str, accuracy: float | None, macs: float, curve: tuple[float, ...], seed: int) -> None:
    made = report(title=title, before=metrics(accuracy=accuracy, macs=macs), curve=curve, seed=seed)
    assert Report.from_json(made.to_json()) == made


def test_json_is_strict_even_of_what_is_not_a_number() -> None:
    made = report(after=metrics(latency_s=math.nan))
    data = json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["schema"] == 1
    assert math.isnan(Report.from_json(made.to_json()).after.latency_s)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no report"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "title": "x"}', "damaged"),
        (report().to_json().replace('"macs": 4000000.0', '"macs": "many"'), "damaged"),
    ],
)
def test_what_is_no_report_is_refused(text: str, reason: str) -> None:
    with pytest.raises(FxoptError, match=reason):
        Report.from_json(text)


@pytest.mark.parametrize(("achieved", "met"), [(2.4e-3, True), (2.4e-3 * (1 + 1e-12), True), (2.41e-3, False)])
def test_a_budget_is_met_up_to_rounding(achieved: float, met: bool) -> None:
    budget = BudgetLine("latency", "latency <= 2.4 ms", 2.4e-3, 4e-3, achieved)
    made = report(budgets=(budget,))
    assert budget.met is met
    assert ("Over budget in latency" in made.verdict) is not met
    assert ("over budget" in str(made)) is not met


def test_the_verdict_says_what_came_of_it() -> None:
    assert report().verdict == (
        "The budget is met: accuracy 97.50% after 98.00%, 50% of the MACs, 25% of the size, "
        "50% of the latency predicted for pixel1, 100% of the latency measured on this machine."
    )
    assert "No budget was set" in report(budgets=()).verdict
    assert report(budgets=report().budgets * 2).verdict.startswith("Every budget is met: ")
    assert "measured" not in report(before=metrics(measured_latency_s=None)).verdict


def test_without_data_no_accuracy_is_claimed() -> None:
    made = report(score_name="data-free: minus output error", before=metrics(accuracy=-0.0), budgets=())
    assert "accuracy unknown" in made.verdict
    assert "Accuracy" not in table_text(made.table())
    assert "-0.5" in str(report(score_name="evaluate", after=metrics(accuracy=-0.5)))


def test_predicted_and_measured_are_told_apart() -> None:
    columns = [[str(cell) for cell in column.cells] for column in report().table().columns]
    known = dict(zip(columns[0], columns[1], strict=True))
    assert known["Latency"] == "predicted for pixel1"
    assert known["Latency on this machine"] == "measured"


def test_the_text_has_everything_a_reader_needs() -> None:
    made = report()
    text = str(made)
    wanted = [
        "98.00%",
        "97.50%",
        "calibrated",
        "Mean error 2.1%",
        "At 8 bits.",
        "No training data",
        "roll",
        "custom_op",
    ]
    assert [one for one in [*wanted, "blocks.0", "evolution", "seed 3"] if one not in text] == []
    assert "\x1b" not in text


def test_the_exported_file_is_told_layer_by_layer() -> None:
    text, page = str(report()), report().to_html()
    for shown in (text, page):
        for wanted in (
            "file size",
            "12.3 KB",
            "latency measured on this machine",
            "1.23 ms",
            "QLinearConv",
            "integers",
        ):
            assert wanted in shown, wanted
    assert "conv<1>" in text
    assert "4/8" in text
    assert "<td>32/32</td>" in page.replace(' class="n"', "")
    assert "node_a&lt;b&gt;" in page
    assert "conv&lt;1&gt;" in page
    assert report().export is not None
    assert Report.from_json(report().to_json()).export == report().export


def test_markup_in_names_is_taken_literally() -> None:
    made = report(title="[red]net[/red]", layers=(layer("head[0]/[/x]"),))
    assert "head[0]/[/x]" in table_text(made.layer_table())
    assert "[red]net[/red]" in str(made)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_save_writes_by_suffix(name: str, tmp_path: Path) -> None:
    path = report().save(tmp_path / "deep" / name)
    text = path.read_text(encoding="utf-8")
    assert text in (report().to_json(), report().to_html())
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxoptError, match=r"\.json or \.html"):
        report().save(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FxoptError, match="Cannot write"):
        report().save(tmp_path / "file" / "report.json")


def test_a_run_of_several_samples_is_told_beside_every_prediction() -> None:
    several = dataclasses.replace(report().target, batch=8)
    made = report(target=several)
    how = {row.label: row.source for row in summary(made)}
    assert how["MACs"] == "counted, 8 samples a run"
    assert how["Latency"] == how["Peak activations"] == "predicted for pixel1, 8 samples a run"
    assert how["Parameters"] == how["Size of weights"] == "counted"
    assert "Budget for pixel1, 8 samples a run" in str(made)
    assert made.to_html().count("predicted for pixel1, 8 samples a run") >= 5
    assert "samples a run" not in str(report()) + report().to_html()
    assert Report.from_json(made.to_json()) == made
    older = made.to_data()
    del older["target"]["batch"]
    assert Report.from_json(json.dumps(older)).target.batch == 1
