"""What the pages show, from made-up values: states, escaping, empty states, what a viewer is offered. No database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from starlette.requests import Request

from clinical_orchestration.airflow.catalog import Dag, Task
from clinical_orchestration.airflow.runs import DagRun
from clinical_orchestration.contract import PIPELINES
from clinical_orchestration.page import graph, measures
from clinical_orchestration.page.bounded import Background, Bounded
from clinical_orchestration.page.pipelines import (
    BAR_STEPS,
    PipelineView,
    bars_of,
    dag_links,
    duration,
    run_link,
)
from clinical_orchestration.page.rendering import environment, render
from clinical_orchestration.page.run_view import LogView, RunView, TaskView
from clinical_orchestration.users.identity import Identity
from clinical_orchestration.users.roles import BUILT_IN

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
NASTY = """x"><script>alert(1)</script>'&"""


def identity(role: str) -> Identity:
    return Identity("ann<b>", (role,), frozenset(BUILT_IN[role]), "session")


def request(who: Identity | None = None) -> Request:
    state = {} if who is None else {"identity": who, "csrf_token": "token-1"}
    return Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "state": state})


def html_of(template: str, values: dict[str, Any], who: Identity | None = None) -> str:
    return bytes(render(request(who), template, values).body).decode()


def dag_run(number: int, state: str, seconds: float | None = 10.0, **more: Any) -> DagRun:
    start = NOW - timedelta(hours=10 - number)
    values: dict[str, Any] = {
        "id": number, "dag_id": "p", "run_id": f"run-{number}", "dagster_run_id": f"d{number}", "logical_date": start,
        "data_interval_start": start, "data_interval_end": start, "run_type": "manual", "external_trigger": True,
        "state": state, "start_date": None if seconds is None else start,
        "end_date": None if seconds is None or state == "running" else start + timedelta(seconds=seconds),
        "updated_at": start, "created_at": start, "conf": {}, "note": None, "held": False,
    }  # fmt: skip
    return DagRun(**{**values, **more})


def pipeline(*runs: DagRun, **more: Any) -> PipelineView:
    values: dict[str, Any] = {
        "dag_id": "clinical", "description": "Does it", "tags": (), "cron": "0 */6 * * *", "every": "every 6 h",
        "paused": False, "next_tick": NOW + timedelta(hours=6), "bars": bars_of(runs, NOW),
        "links": (("Graph", "/dagster/locations/r%40l/jobs/clinical"),),
    }  # fmt: skip
    return PipelineView(**{**values, **more})


def front(**more: Any) -> dict[str, Any]:
    return {
        "pipelines": (), "problems": (), "pipelines_note": "No pipeline is loaded.", "alerts": None, "models": (),
        "models_note": "", "retraining": {}, "measures": (), "health": {"scheduler": {"status": "healthy"}},
        "levels": [], "unhealthy": [], "stale": False, "age_seconds": 0.0, "mlflow_url": "http://127.0.0.1:5000",
        "serving_url": "http://127.0.0.1:8000", **more,
    }  # fmt: skip


def run_page(run: DagRun, task: str = "", log: LogView | None = None, **states: str) -> dict[str, Any]:
    tasks = {
        name: TaskView(name, states.get(name, "none"), NOW, 1.5, ((1, f"?task={name}&try=1#task"),), "default_pool",
                       None, "", ((f"layer/{name}", f"/dagster/assets/layer/{name}"),), f"?task={name}#task")
        for name in ("start_p", "work", "end_p")
    }  # fmt: skip
    drawn = graph.lay_out(chain("start_p", "work", "end_p"))
    view = RunView(
        run, 12.0, json.dumps(run.conf), tasks, drawn.nodes, drawn.paths, drawn.width, drawn.height,
        bars_of([run], NOW), (("Dagster run", "/dagster/runs/d1"),), log, "/api/v1/dags/p/dagRuns/run-1",
    )  # fmt: skip
    return {"view": view, "task": task}


def graph_of(names: Iterable[str], edges: Sequence[tuple[str, str]]) -> dict[str, Task]:
    return {
        name: Task(name, name, tuple(a for a, b in edges if b == name), tuple(b for a, b in edges if a == name))
        for name in names
    }


def chain(*names: str) -> dict[str, Task]:
    return graph_of(names, list(pairwise(names)))


class Controls(HTMLParser):
    """Finds the buttons and form fields of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("button", "input", "textarea"):
            self.found.append((tag, dict(attrs)))

    def changing(self) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.found if {"data-change", "data-dialog"} & attrs.keys()]


def test_a_bar_says_state_time_and_duration_and_leads_to_its_run() -> None:
    runs = [dag_run(3, "running", 1.0), dag_run(2, "failed", 20.0), dag_run(1, "queued", None)]
    text = html_of("front.html", front(pipelines=(pipeline(*runs),)))
    bars = re.findall(
        r'<a class="bar h(\d+) s-(\w+)" href="([^"]+)" title="([^"]+)" aria-label="([^"]+)"( tabindex)?', text
    )
    assert [bar[1] for bar in bars] == ["queued", "failed", "running"]
    assert bars[1][2] == "/runs/p/run-2"
    assert bars[1][3] == bars[1][4] == "failed, started 2026-11-23 04:00:00 UTC, 20 s, run-2"
    assert "so far" in bars[2][3]
    assert bars[0][3] == "queued, not started, run-1"
    # the one that runs for hours is the highest; one stop of the tabulator for all of them
    assert [int(bar[0]) for bar in bars] == [1, 1, BAR_STEPS]
    assert [bool(bar[5]) for bar in bars] == [True, True, False]


def test_a_pipeline_shows_schedule_next_run_and_links() -> None:
    text = html_of("front.html", front(pipelines=(pipeline(dag_run(1, "success")),)))
    assert "every 6 h" in text
    assert "0 */6 * * *" in text
    assert f'<time datetime="{(NOW + timedelta(hours=6)).isoformat()}">2026-11-23 18:00</time>' in text
    assert 'href="/dagster/locations/r%40l/jobs/clinical" aria-label="Graph of clinical"' in text
    assert "No run yet" in html_of("front.html", front(pipelines=(pipeline(),)))


def test_the_switch_says_what_is_and_sends_the_opposite() -> None:
    for paused in (True, False):
        text = html_of("front.html", front(pipelines=(pipeline(paused=paused),)))
        switch = next(one for one in Controls(text).changing() if one.get("role") == "switch")
        assert switch["aria-checked"] == ("false" if paused else "true")
        assert ('data-paused="yes"' in text) is paused  # the dialog says that the run will wait
        assert json.loads(switch["data-body"] or "") == {"is_paused": not paused}
        assert (switch["data-method"], switch["data-change"]) == (
            "PATCH", "/api/v1/dags/clinical?update_mask=is_paused",
        )  # fmt: skip


@pytest.mark.parametrize("role", ["Viewer", "User"])
def test_what_a_visitor_may_not_do_is_shown_and_disabled_with_the_reason(role: str) -> None:
    may = role == "User"
    pages = [
        html_of("front.html", front(pipelines=(pipeline(dag_run(1, "failed")),)), identity(role)),
        html_of("run.html", run_page(dag_run(1, "failed"), "work", work="failed"), identity(role)),
    ]
    for text in pages:
        changing = Controls(text).changing()
        assert len(changing) >= 2
        for button in changing:
            assert ("disabled" in button) is not may, button
            assert may or button["title"] == "Your roles let you look, not change."
        assert "Signed in as <strong>ann&lt;b&gt;</strong>" in text
        assert '<form method="post" action="/logout">' in text
        assert '<meta name="csrf-token" content="token-1">' in text


def test_without_a_login_everything_is_offered_and_nobody_is_named() -> None:
    text = html_of("front.html", front(pipelines=(pipeline(),)))
    assert all("disabled" not in button for button in Controls(text).changing())
    assert "Signed in" not in text
    assert "/logout" not in text


def test_names_conf_notes_and_logs_are_escaped() -> None:
    run = dag_run(1, "failed", conf={"evil": NASTY}, note=NASTY, run_id=NASTY)
    values = run_page(run, "work", work="failed")
    task = values["view"].tasks["work"]
    log = LogView(replace(task, note=NASTY), 1, "failed", NASTY, False, "/api/v1/x", None)
    values["view"] = replace(values["view"], log=log, conf=json.dumps(run.conf, indent=2))
    pages = [
        html_of("run.html", values, Identity(NASTY, (NASTY,), frozenset(BUILT_IN["Admin"]), "session")),
        html_of("front.html", front(pipelines=(pipeline(run, dag_id=NASTY, description=NASTY),), problems=(NASTY,))),
    ]
    for text in pages:
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)" in text
        # no attribute ends early: the parser finds no attribute made of its rest
        for _, attributes in Controls(text).found:
            assert not [name for name in attributes if "script" in name or "'" in name or '"' in name]
    clear = next(one for one in Controls(pages[0]).changing() if one["data-ask"] and "failed tasks" in one["data-ask"])
    assert json.loads(clear["data-body"] or "")["dag_run_id"] == NASTY


def test_empty_states_say_so() -> None:
    text = html_of("front.html", front())
    assert "No pipeline is loaded." in text
    assert "Nothing has been measured yet" in text
    assert "No embedded stack reports here" in text
    assert "The alerts cannot be read now" in text
    assert "The figures cannot be read now" in html_of("front.html", front(measures=None))
    assert "The page that" not in html_of("error.html", {"title": "Not found", "text": "none"})


@pytest.mark.parametrize(
    ("state", "offered"),
    [
        ("success", {"Clear run", "Mark failed"}),
        ("failed", {"Clear run", "Clear failed tasks", "Mark success"}),
        ("running", {"Stop and mark failed"}),
    ],
)
def test_a_run_offers_what_its_state_allows(state: str, offered: set[str]) -> None:
    text = html_of("run.html", run_page(dag_run(1, state), work="failed" if state == "failed" else state))
    head = text[: text.index('<div class="run-body">')]
    assert set(re.findall(r"<button[^>]+data-change[^>]*>([^<]+)</button>", head)) == offered
    assert f'data-every="{2 if state == "running" else 10}"' in text
    assert ("read its log" in text) is (state == "failed")


def test_a_held_run_says_what_it_waits_for() -> None:
    text = html_of("run.html", run_page(dag_run(1, "queued", None, held=True)))
    assert "the run waits until it is active again" in text
    assert "mark failed" not in text


def test_the_graph_has_every_task_with_its_state_in_words() -> None:
    text = html_of("run.html", run_page(dag_run(1, "running"), start_p="success", work="up_for_retry"))
    nodes = re.findall(r'<a id="node-(\w+)" class="node s-(\w+)" href="([^"]+)" aria-label="([^"]+)"', text)
    assert [(name, state) for name, state, _, _ in nodes] == [
        ("start_p", "success"), ("work", "up_for_retry"), ("end_p", "none"),
    ]  # fmt: skip
    assert nodes[1][3] == "work: up for retry, 1.5 s"
    assert nodes[2][3].startswith("end_p: not started")


def test_a_log_may_be_hidden_from_who_may_not_read_it() -> None:
    nobody = Identity("n", (), frozenset(), "session")
    assert "Your roles do not permit reading logs." in html_of(
        "run.html", run_page(dag_run(1, "success"), "work"), nobody
    )
    task = run_page(dag_run(1, "success"))["view"].tasks["work"]
    log = LogView(task, 2, "success", "the end", True, "/api/v1/whole", "/dagster/runs/d1")
    text = html_of("run.html", run_page(dag_run(1, "success"), "work", log))
    assert ">the end</pre>" in text
    assert "Only the end is shown" in text
    assert 'href="/api/v1/whole"' in text


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", PIPELINES, ids=lambda one: one.name)
def test_graphs_run_downward_and_nothing_overlaps(contract: Any) -> None:
    drawn = graph.lay_out(graph_of(contract.tasks, contract.edges))
    place = {node.task_id: node for node in drawn.nodes}
    assert set(place) == set(contract.tasks)
    assert all(place[a].y < place[b].y for a, b in contract.edges)
    assert len(drawn.paths) == len(contract.edges)
    for node in drawn.nodes:
        assert 0 <= node.x <= drawn.width - graph.NODE_WIDTH
        assert 0 <= node.y <= drawn.height - graph.NODE_HEIGHT
        assert max(len(line) for line in node.lines) <= graph.LINE_LENGTH
        assert "".join(node.lines) == node.task_id
        for other in drawn.nodes:
            apart = abs(node.x - other.x) >= graph.NODE_WIDTH or abs(node.y - other.y) >= graph.NODE_HEIGHT
            assert node is other or apart
    assert drawn.width <= 400  # readable on a phone


def test_an_edge_past_other_tasks_goes_around_them() -> None:
    drawn = graph.lay_out(graph_of("abc", [("a", "b"), ("a", "c"), ("b", "c")]))
    b = next(node for node in drawn.nodes if node.task_id == "b")
    around = next(path for path in drawn.paths if "V" in path)
    passes = float(re.findall(r"([\d.]+) [\d.]+V", around)[0])
    assert not b.x <= passes <= b.x + graph.NODE_WIDTH


def test_a_circle_is_drawn_too() -> None:
    assert len(graph.lay_out(graph_of("ab", [("a", "b"), ("b", "a")])).nodes) == 2
    assert graph.lay_out({}).nodes == ()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_series_of_quality_and_performance_by_trial() -> None:
    days = [NOW + timedelta(days=day) for day in range(3)]
    quality = [
        (day, "pilot", {"scores": {"lab_results": score}, "threshold": 0.95})
        for day, score in zip(days, (0.99, 0.97, 0.90), strict=True)
    ]
    performance = [
        (days[0], "pilot", {"status": "ok", "auroc": {"value": 0.8}, "baseline": {"auroc": 0.82}}),
        (days[1], "pilot", {"status": "insufficient_data", "auroc": None, "baseline": None, "reasons": ["few"]}),
        (days[1], "other", {"status": "insufficient_data", "auroc": None, "reasons": []}),
    ]
    other, pilot = measures.measures_of(quality, performance)
    assert (other.trial, other.quality, other.performance, other.note) == ("other", (), (), "too few data")
    score = pilot.quality[0]
    assert (score.name, score.latest, score.bound, score.good) == ("lab results", 0.90, 0.95, False)
    assert score.text == (
        "lab results: 0.900 on 2026-11-25 12:00 UTC; 3 runs between 0.900 and 0.990; threshold 0.950"
    )  # fmt: skip
    assert [one.name for one in pilot.performance] == ["AUROC"]
    assert pilot.performance[0].good is None  # training is a comparison, not a bound
    assert pilot.note == "too few data: few"
    heights = [float(point.split(",")[1]) for point in score.line.split()]
    assert heights == sorted(heights)  # falling values go down the picture
    assert 0 <= min(heights) <= max(heights) <= measures.HEIGHT
    text = html_of("front.html", front(measures=(other, pilot)))
    assert f'role="img" aria-label="{score.text}"' in text
    assert "Not measured yet." not in text


def test_a_series_that_does_not_change_is_a_line_not_a_mountain() -> None:
    flat = measures.Series("x", tuple((NOW, 0.9 + step / 10_000) for step in range(5)))
    heights = [float(point.split(",")[1]) for point in flat.line.split()]
    assert max(heights) - min(heights) < 2
    single = measures.Series("x", ((NOW, 0.5),))
    assert single.end == (measures.PADDING, measures.HEIGHT / 2)


def test_the_newest_materializations_are_read() -> None:
    import dagster as dg

    with dg.DagsterInstance.ephemeral() as instance:
        for score in (0.9, 0.8):
            result = {"scores": {"lab_results": score}, "threshold": 0.95}
            metadata = {"trial": "pilot", "result": dg.MetadataValue.json(result)}
            instance.report_runless_asset_event(dg.AssetMaterialization(["quality", "report"], metadata=metadata))
        instance.report_runless_asset_event(dg.AssetMaterialization(["quality", "report"]))  # by hand, without result
        (found,) = measures.read_measures(instance)
    assert [value for _, value in found.quality[0].points] == [0.9, 0.8]


# --- times and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (34, "34 s"), (125, "2 min 5 s"), (11_040, "3 h 4 min"), (7200, "2 h"),
     (525_600, "6 d 2 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-30, "just now"), (-300, "5 min ago"), (7300, "in 2 h"), (20, "in less than a minute"), (-200_000, "2 d ago")],
)
def test_how_far_away(seconds: float, text: str) -> None:
    assert environment().filters["away"](NOW + timedelta(seconds=seconds), NOW) == text


def test_links_are_quoted() -> None:
    assert run_link("a b", "manual__2026-01-01T00:00:00+00:00/x") == (
        "/runs/a%20b/manual__2026-01-01T00%3A00%3A00%2B00%3A00%2Fx"
    )  # fmt: skip
    dag = Dag("job", "", (), (), {}, location="code", repository="__repository__")
    assert dict(dag_links(dag, "/dagster"))["Graph"] == "/dagster/locations/__repository__@code/jobs/job"


# --- reading in the background ---------------------------------------------------------------------------------------


def test_only_the_first_waits_and_what_hangs_is_not_waited_for() -> None:
    import asyncio
    import threading

    release = threading.Event()
    answers: Iterator[int] = iter(range(10))

    def slow() -> int:
        number = next(answers)
        if number == 1:
            release.wait(10)
        return number

    async def scenario() -> None:
        background = Background(slow, 0.2, fresh_seconds=0.0)
        assert await background() == 0
        assert await background() == 0  # asked again behind it, which hangs
        await asyncio.sleep(0.25)
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(TimeoutError):
            await background()
        assert loop.time() - began < 0.1
        release.set()
        await asyncio.sleep(0.05)
        assert await background() >= 1

    asyncio.run(scenario())


def test_after_a_change_what_was_asked_before_it_does_not_count() -> None:
    import asyncio
    import threading

    began, release, value = threading.Event(), threading.Event(), ["old"]

    def read() -> str:
        seen = value[0]
        began.set()
        release.wait(5)
        return seen

    async def scenario() -> None:
        bounded = Bounded(read, 2.0, fresh_seconds=60.0)
        early = asyncio.ensure_future(bounded())
        await asyncio.to_thread(began.wait)
        value[0] = "new"
        late = asyncio.ensure_future(bounded.anew())
        await asyncio.sleep(0.05)
        release.set()
        assert await early == "old"
        assert await late == "new"

    asyncio.run(scenario())
