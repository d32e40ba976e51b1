"""TOML of files that somebody wrote by hand."""

import tomllib
from pathlib import Path
from typing import Any

from saap_jax.runtime.errors import reading


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """Read the table of a TOML file; `name` says in messages what the file is, and ValueError that it is none."""
    with reading(f"{name} {path}", "TOML"):
        return tomllib.loads(Path(path).read_bytes().decode("utf-8"))
