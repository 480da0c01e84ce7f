import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clinical_orchestration.serving.spool import Spool, SpoolFullError, SpoolInUseError, open_spool


def rows(*names: str) -> list[dict[str, str]]:
    return [{"name": name} for name in names]


def names(spool: Spool, after: int = 0, limit: int = 100) -> list[str]:
    return [row["name"] for row in spool.read(after, limit).rows]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def test_rows_come_back_in_order_and_from_any_point(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.append(rows("a", "b")) == 2
    assert spool.append(rows("c")) == 3
    assert names(spool) == ["a", "b", "c"]
    assert names(spool, after=2) == ["c"]
    first = spool.read(0, 2)
    assert (first.last_sequence, [row["name"] for row in first.rows]) == (2, ["a", "b"])
    assert names(spool, after=0, limit=2) == ["a", "b"]  # again, after having read on
    assert spool.read(3, 10).rows == []
    spool.close()


def test_sequence_goes_on_after_a_restart_under_the_same_id(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(rows("a", "b"))
    log_id = spool.log_id
    spool.close()
    again = Spool(tmp_path)
    assert (again.log_id, again.last_sequence) == (log_id, 2)
    assert again.append(rows("c")) == 3
    assert names(again) == ["a", "b", "c"]
    again.forget(2)
    again.close()
    third = Spool(tmp_path)
    assert names(third, after=2) == ["c"]
    third.forget(3)
    third.close()
    assert Spool(tmp_path).last_sequence == 3  # although every row is forgotten


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(rows("a"))
    spool.close()
    with segments(tmp_path)[-1].open("ab") as file:
        file.write(b'{"sequence":2,"name":"b')
    again = Spool(tmp_path)
    assert again.append(rows("c")) == 2
    assert names(again) == ["a", "c"]
    again.close()


def test_zeros_after_a_power_loss_are_left_out_and_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(rows("a"))
    spool.close()
    with segments(tmp_path)[-1].open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    again = Spool(tmp_path)
    again.append(rows("b"))
    assert names(again) == ["a", "b"]
    assert again.corrupt_lines > 0
    again.close()


def test_segments_rotate_and_stored_ones_are_deleted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=100)
    for number in range(20):
        spool.append(rows(str(number)))
    count = len(segments(tmp_path))
    assert count > 3
    batch = spool.read(0, 7)
    spool.forget(batch.last_sequence)
    assert 1 < len(segments(tmp_path)) < count
    assert names(spool, after=7) == [str(number) for number in range(7, 20)]
    spool.forget(20)
    assert len(segments(tmp_path)) == 1
    assert spool.size_bytes == sum(path.stat().st_size for path in segments(tmp_path))
    spool.close()


def test_a_full_spool_refuses_rows(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=100)
    spool.append(rows("a"))
    with pytest.raises(SpoolFullError):
        spool.append(rows("b" * 100))
    assert names(spool) == ["a"]
    spool.close()


def test_a_write_that_stops_half_way_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    spool.append(rows("a"))
    real, calls = os.write, []

    def half(file: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) == 1:
            return real(file, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        spool.append(rows("b"))
    monkeypatch.undo()
    assert spool.append(rows("c")) == 2
    assert names(spool) == ["a", "c"]
    spool.close()


def test_two_processes_never_share_a_spool(tmp_path: Path) -> None:
    first, abandoned = open_spool(tmp_path)
    assert abandoned == []
    with pytest.raises(SpoolInUseError):
        Spool(first.folder)
    second, _ = open_spool(tmp_path)
    assert second.folder != first.folder
    second.append(rows("left behind"))
    second.close()
    first.close()
    mine, others = open_spool(tmp_path)
    assert mine.folder == first.folder
    assert [names(spool) for spool in others] == [["left behind"]]
    for spool in (mine, *others):
        spool.close()


def test_rows_survive_sigkill_right_after_append(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from clinical_orchestration.serving.spool import Spool\n"
        "s = Spool(Path(sys.argv[1])); s.append([{'name': 'kept'}]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -9
    spool = Spool(tmp_path)
    assert names(spool) == ["kept"]
    spool.close()


def test_the_open_file_is_given_back_too_once_it_is_stored(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(rows(*["x" * 1000] * 100))
    assert spool.size_bytes > 100_000
    spool.forget(99)
    assert spool.size_bytes > 100_000
    spool.forget(100)
    assert spool.size_bytes == 0
    assert spool.append(rows("next")) == 101
    assert names(spool, after=100) == ["next"]
    spool.close()
