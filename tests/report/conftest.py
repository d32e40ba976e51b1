"""A finished comparison that is invented."""

import pytest

from saap_jax.runs.directory import RunDirectory
from tests.fake_runs import kept_run


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A finished run directory."""
    return kept_run(tmp_path / "fake")
