"""Fixtures that several tests of the built program share."""

from __future__ import annotations

import shutil

import pytest
from graft_cli import LENGTHS, succeed, write_long_run, write_rows
from tiny_base import write_adapter, write_model


@pytest.fixture
def rows(tmp_path):
    """A shard of this test's own."""
    write_rows(tmp_path / "rows.h5", LENGTHS)
    return tmp_path / "rows.h5"


@pytest.fixture(scope="session")
def long_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.h5"
    write_rows(path, LENGTHS)
    return path


@pytest.fixture
def long_run(tmp_path, long_rows):
    """long_run(override...) -> the path of such a run's file."""
    return lambda *overrides, folder="job": write_long_run(tmp_path / folder, long_rows, *overrides)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, long_rows):
    """The folder of the uninterrupted long run on one rank. Only to look at."""
    path = write_long_run(tmp_path_factory.mktemp("reference"), long_rows)
    succeed("train", path)
    return path.parent / "run"


@pytest.fixture
def finished(long_run, reference):
    """The config of a long run that has ended, a copy of the reference."""
    path = long_run()
    shutil.copytree(reference, path.parent / "run")
    return path


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    """LoRA on three matrices of each layer of `model`."""
    return write_adapter(tmp_path / "adapter")
