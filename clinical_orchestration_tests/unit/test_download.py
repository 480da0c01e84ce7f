"""Objects of a prefix as a folder of files, for runs over a landing prefix."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from clinical_orchestration.resources import PipelineResource
from clinical_orchestration.stores.objects import ObjectNotFoundError, ObjectStore, download
from clinical_orchestration_tests.fakes import InMemoryObjects


def test_objects_directly_below_the_prefix_become_files(tmp_path: Path) -> None:
    objects = InMemoryObjects()
    objects.put("landing/pilot/vs.csv", b"one")
    objects.put("landing/pilot/deeper/lb.csv", b"two")
    objects.put("landing/pilot2/ae.csv", b"three")
    folder = download(objects, "landing/pilot", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"vs.csv": b"one"}


def test_what_changed_is_copied_again_and_what_is_gone_is_removed(tmp_path: Path) -> None:
    objects = InMemoryObjects()
    objects.put("in/vs.csv", b"one")
    objects.put("in/lb.csv", b"old")
    folder = download(objects, "in/", tmp_path)
    objects.put("in/vs.csv", b"other")
    del objects.objects["in/lb.csv"]
    assert download(objects, "in/", tmp_path) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"vs.csv": b"other"}


def test_an_empty_prefix_is_said(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFoundError, match="no object below s3://"):
        download(InMemoryObjects(), "nothing", tmp_path)


@pytest.mark.integration
def test_a_run_takes_a_prefix_of_the_bucket_as_its_source(
    s3_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3_env, "CLINICAL_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    ObjectStore.from_settings().put("landing/test-download/vs.csv", b"a,b\n")
    source = PipelineResource(source="s3://clinical-mlops/landing/test-download/").source_folder()
    assert source is not None
    assert (source / "vs.csv").read_bytes() == b"a,b\n"
    with pytest.raises(dg.Failure, match="no object below s3://clinical-mlops/landing/none/"):
        PipelineResource(source="s3://clinical-mlops/landing/none/").source_folder()
