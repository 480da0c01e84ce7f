"""The benchmark of starting runs: its table says what was measured and wanted, and its sides are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.orchestration import MANY_STEPS, pipeline, report
from benchmarks.orchestration.definitions import defs
from benchmarks.orchestration.deployments import dagster_yaml
from benchmarks.orchestration.report import Figures, Target, digits, document, plot, table
from clinical_orchestration.contract import CLINICAL_DATA_PIPELINE


@pytest.fixture
def figures() -> Figures:
    made = Figures()
    made.add(report.BURST, report.IN_PROCESS, 8.0, 7.0, 9.0)
    made.add(report.END, report.FORKED, 0.5, 0.9, 2.0)
    made.add(report.FIRST, report.FORKED, 0.1, 0.1, 0.3)
    made.add(report.END, report.AIRFLOW, 12.0)
    made.add(report.FIRST, report.AIRFLOW, 1.25)
    made.add_ratio(report.AIRFLOW, mine=0.9, other=12.0)
    made.add_ratio(report.STOCK_MULTI, mine=0.9, other=18.0)
    return made


def test_the_table_has_what_was_measured_beside_what_is_wanted(figures: Figures) -> None:
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table(figures).splitlines()[2:]]
    assert rows == [
        (report.FIRST, report.FORKED, "0.10", "0.10", "0.30", "s", "3", "< 0.2 s", "reached"),
        (report.FIRST, report.AIRFLOW, "1.25", "1.25", "1.25", "s", "1", "", ""),
        (report.END, report.FORKED, "0.50", "0.90", "2.00", "s", "3", "< 0.9 s", "**not reached**"),
        (report.END, report.AIRFLOW, "12.0", "12.0", "12.0", "s", "1", "", ""),
        (report.FASTER, report.AIRFLOW, "13.3", "13.3", "13.3", "times", "1", "≥ 12 times", "reached"),
        (report.FASTER, report.STOCK_MULTI, "20.0", "20.0", "20.0", "times", "1", "≥ 25 times", "**not reached**"),
        (report.BURST, report.IN_PROCESS, "7.00", "8.00", "9.00", "runs/s", "3", "≥ 8 runs/s", "reached"),
    ]


def test_a_target_is_for_the_median() -> None:
    assert Target(1).reached([0.9, 0.99, 50])
    assert not Target(1).reached([0.1, 1.0, 1.0])
    assert Target(8, at_least=True).reached([1, 8, 8])
    assert not Target(8, at_least=True).reached([7.9, 7.9, 100])


def test_a_figure_without_a_unit_or_a_target_without_a_figure_is_a_mistake() -> None:
    assert {what for what, _ in report.TARGETS} <= set(report.UNITS)
    with pytest.raises(ValueError, match="not in list"):
        table(Figures({("how many", "ours"): [1.0]}))


def test_the_page_shows_the_plot_that_is_drawn(figures: Figures, tmp_path: Path) -> None:
    plot(figures, tmp_path / "plot.svg")
    drawing = (tmp_path / "plot.svg").read_text()
    for expected in (report.FORKED, report.AIRFLOW, " 0.90 s", " 12.0 s", " 0.10 s"):
        assert expected in drawing
    plot(figures, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawing, "the same figures give the same file"
    page = document(figures, ["How."], "plot.svg")
    assert "(plot.svg)" in page
    assert "How." in page
    assert "(" not in document(Figures(), [], "").splitlines()[-1]


@pytest.mark.parametrize("how", ["in_process", "forked", "multiprocess"])
def test_the_measured_run_has_the_graph_of_the_pipeline(how: str) -> None:
    job = defs.resolve_job_def(f"pipeline_{how}")
    assert {node.name for node in job.graph.nodes} == set(CLINICAL_DATA_PIPELINE.tasks)
    edges = {
        (output.node_name, node.name)
        for node in job.graph.nodes
        for outputs in job.graph.dependency_structure.input_to_upstream_outputs_for_node(node.name).values()
        for output in outputs
    }
    assert edges == set(CLINICAL_DATA_PIPELINE.edges)
    assert job.executor_def.name == how


def test_many_steps_are_as_many_as_the_table_says() -> None:
    assert MANY_STEPS == 1000
    assert "1,000" in report.MANY
    for how in ("in_process", "forked"):
        assert len(defs.resolve_job_def(f"many_{how}").graph.nodes) == MANY_STEPS


def test_the_sides_differ_in_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINICAL_RUN_LAUNCHER", "default")
    stock = dagster_yaml(own=False, queued=False)
    ours = dagster_yaml(own=True, queued=False)
    queued = dagster_yaml(own=True, queued=True)
    assert "clinical_orchestration" not in str(stock)
    assert "run_launcher" not in stock
    assert stock["storage"] == {"postgres": {"postgres_url": {"env": "POSTGRES_URL"}}}
    assert [settings["run_coordinator"]["class"] for settings in (stock, ours)] == ["DefaultRunCoordinator"] * 2
    assert queued["run_coordinator"]["module"] == "clinical_orchestration.execution.coordinator"
    for settings in (ours, queued):
        assert settings["run_launcher"]["class"] == "WarmRunLauncher"
        assert settings["compute_logs"]["class"] == "DirectComputeLogManager"
        assert "Pooled" in str(settings["storage"])


def test_the_pipeline_is_shown_before_and_after() -> None:
    taken = {
        "before": {part: [3.0, 5.0, 4.0] for part in pipeline.PARTS},
        "after": {part: [0.2, 0.1, 0.3] for part in pipeline.PARTS},
    }
    page = pipeline.document(taken, 3)
    assert "| launch to first step | before | 3.00 | 4.00 | 5.00 |" in page
    assert "| launch to first step | after | 0.10 | 0.20 | 0.30 |" in page


def test_digits_are_those_that_mean_something() -> None:
    assert [digits(value) for value in (0.056, 3.14159, 29.44, 812.6)] == ["0.06", "3.14", "29.4", "813"]
