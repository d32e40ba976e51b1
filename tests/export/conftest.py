"""What tests with transformers' loading of code share."""

import sys

import pytest


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Keep the code that transformers copies out of a model directory within the test."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
