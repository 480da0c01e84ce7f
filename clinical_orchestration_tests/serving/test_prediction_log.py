import json
import threading
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from clinical_orchestration.serving import prediction_log
from clinical_orchestration.serving.prediction_log import PredictionLog
from clinical_orchestration.serving.spool import Spool
from clinical_orchestration.stores.predictions import PredictionTable, predictions_table
from clinical_orchestration.stores.tables import DeltaTableStore, TransactionMovedError
from clinical_orchestration.tables import PREDICTIONS, PREDICTIONS_COLUMNS, arrow_schema
from clinical_orchestration_tests.serving.fakes import FakeSink, wait_for


def row(name: str) -> dict[str, object]:
    return {
        "prediction_id": name,
        "predicted_at": 1_767_225_600_000_001,
        "trial": "cdisc-pilot",
        "patient_id": None,
        "model_name": "m",
        "model_version": "3",
        "probability": 0.25,
        "risk_band": "medium",
        "feature_time": 1_767_225_599_000_000,
        "feature_age_seconds": 1.0,
        "stale": False,
        "features": json.dumps({"age_years": 70.0, "lab_alt_latest": None}),
    }


def rows(*names: str) -> list[dict[str, object]]:
    return [row(name) for name in names]


def started(folder: Path, sink: FakeSink, **options: object) -> PredictionLog:
    log = PredictionLog(folder, lambda: sink, flush_seconds=0.01, **options)  # type: ignore[arg-type]
    log.start()
    return log


def test_rows_reach_the_table_and_the_spool_is_emptied(tmp_path: Path) -> None:
    sink = FakeSink()
    log = started(tmp_path, sink)
    log.record(rows("a", "b"))
    log.record(rows("c"))
    assert log.flush(5.0)
    assert sink.ids() == ["a", "b", "c"]
    assert (log.state().backlog, log.state().written) == (0, 3)
    log.close()


def test_rows_wait_while_the_table_is_out(tmp_path: Path) -> None:
    sink = FakeSink(out=True)
    log = started(tmp_path, sink)
    log.record(rows("a"))
    wait_for(lambda: log.state().write_failures > 0)
    state = log.state()
    assert (state.backlog, state.dropped) == (1, 0)
    assert state.last_error == "gold/predictions cannot be written: OSError"
    sink.out = False
    assert log.flush(5.0)
    assert sink.ids() == ["a"]
    wait_for(lambda: log.state().last_error is None)
    log.close()


def test_a_table_that_hangs_is_told_before_the_driver_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    class Hanging(FakeSink):
        def last_sequence(self, log_id: str) -> int:
            assert answer.wait(10)
            return super().last_sequence(log_id)

    monkeypatch.setattr(prediction_log, "_SLOW_SECONDS", 0.05)
    sink = Hanging()
    log = started(tmp_path, sink)
    log.record(rows("a"))
    wait_for(lambda: "has not answered for" in (log.state().last_error or ""))
    log.record(rows("b"))  # goes on meanwhile
    answer.set()
    assert log.flush(5.0)
    assert log.state().last_error is None
    log.close()
    assert sink.ids() == ["a", "b"]


def test_a_failed_compaction_is_no_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    class Busy(FakeSink):
        def compact(self) -> None:
            tried.set()
            raise OSError("another server compacts")

    monkeypatch.setattr(prediction_log, "_COMPACT_EVERY", 0.0)
    log = started(tmp_path, Busy())
    log.record(rows("a"))
    assert log.flush(5.0)
    assert tried.wait(5)
    log.record(rows("b"))
    assert log.flush(5.0)
    assert (log.state().write_failures, log.state().last_error) == (0, None)
    log.close()


def test_a_commit_whose_answer_was_lost_is_not_repeated(tmp_path: Path) -> None:
    sink = FakeSink(fail_after_commit=1)
    log = started(tmp_path, sink)
    log.record(rows("a", "b"))
    assert log.flush(5.0)
    log.record(rows("c"))
    assert log.flush(5.0)
    assert sink.ids() == ["a", "b", "c"]
    log.close()


def test_the_next_start_goes_on_where_the_table_stands(tmp_path: Path) -> None:
    sink = FakeSink()
    crashed = Spool(tmp_path / "0")
    crashed.append(rows("a", "b", "c"))
    sink.append(rows("a", "b"), crashed.log_id, 0, 2)  # and then the process died
    crashed.close()
    log = started(tmp_path, sink)
    log.record(rows("d"))
    assert log.flush(5.0)
    assert sink.ids() == ["a", "b", "c", "d"]
    log.close()


def test_what_cannot_be_flushed_at_the_end_is_flushed_by_the_next_start(tmp_path: Path) -> None:
    sink = FakeSink(out=True)
    log = started(tmp_path, sink)
    log.record(rows("a"))
    log.close(2.0)
    assert sink.ids() == []
    sink.out = False
    again = started(tmp_path, sink)
    assert again.flush(5.0)
    again.close()
    assert sink.ids() == ["a"]


def test_rows_of_a_server_that_died_elsewhere_are_taken_over(tmp_path: Path) -> None:
    other = Spool(tmp_path / "7")
    other.append(rows("theirs"))
    mine = Spool(tmp_path / "0")
    mine.close()
    other.close()
    sink = FakeSink()
    log = started(tmp_path, sink)
    log.record(rows("mine"))
    assert log.flush(5.0)
    log.close()
    assert sorted(sink.ids()) == ["mine", "theirs"]


def test_a_spool_put_back_to_an_older_state_loses_nothing_new(tmp_path: Path) -> None:
    old = Spool(tmp_path / "0")
    old.append(rows("a"))
    log_id = old.log_id
    old.close()
    sink = FakeSink(stored={log_id: 50})
    log = started(tmp_path, sink)
    wait_for(lambda: log.state().backlog == 0)
    log.record(rows("b"))
    assert log.flush(5.0)
    log.close()
    assert sink.ids() == ["b"]


def test_without_a_spool_rows_go_through_memory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be here")
    sink = FakeSink()
    log = started(blocked, sink)
    log.record(rows("a"))
    assert log.flush(5.0)
    assert sink.ids() == ["a"]
    assert log.state().spool_failures > 0
    assert "cannot be written" in (log.state().last_error or "")
    log.close()


def test_a_full_spool_and_a_full_memory_drop_and_count(tmp_path: Path) -> None:
    sink = FakeSink(out=True)
    log = started(tmp_path, sink, max_spool_bytes=600, memory_rows=2)
    for name in "abcde":
        log.record(rows(name))
    state = log.state()
    assert state.in_memory == 2
    assert state.dropped == 5 - state.backlog
    assert state.dropped > 0
    assert state.spool_failures > 0
    sink.out = False
    assert log.flush(5.0)
    assert len(sink.ids()) == 5 - state.dropped
    log.close()


def test_the_arrow_table_has_the_contract_s_columns() -> None:
    table = predictions_table(rows("a"))
    assert table.schema == arrow_schema(PREDICTIONS_COLUMNS)
    (stored,) = table.to_pylist()
    assert stored["predicted_at"] == datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
    assert stored["prediction_date"] == date(2026, 1, 1)
    assert stored["patient_id"] is None


def test_the_delta_table_holds_each_row_once(tmp_path: Path) -> None:
    tables = DeltaTableStore(str(tmp_path / "lake"))
    sink = PredictionTable(tables)
    assert sink.last_sequence("log") == 0
    sink.append(rows("a", "b"), "log", 0, 2)
    sink.append(rows("a", "b"), "log", 0, 2)  # repeated after a lost answer
    sink.append(rows("c"), "log", 2, 3)
    sink.append(rows("x"), "other", 0, 1)
    with pytest.raises(TransactionMovedError):
        sink.append(rows("c", "d"), "log", 2, 4)
    assert (sink.last_sequence("log"), sink.last_sequence("other")) == (3, 1)
    found = tables.read(PREDICTIONS)
    assert sorted(found.column("prediction_id").to_pylist()) == ["a", "b", "c", "x"]
    sink.compact()
