"""The worker and the tiny inputs, made once a session."""

import os
from pathlib import Path

import pytest

from tests.fuzz import workspace
from tests.fuzz.harness import Harness
from tests.fuzz.worker import Worker


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """Runs cases; see `Harness`."""
    root = tmp_path_factory.mktemp("fuzz")
    base, scratch = root / "base", root / "cases"
    base.mkdir()
    scratch.mkdir()
    with Worker(scratch, Path(os.environ["JAX_COMPILATION_CACHE_DIR"])) as worker:
        workspace.build(base, worker)
        yield Harness(base, scratch, worker)
