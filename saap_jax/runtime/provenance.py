"""What a reader needs to repeat a run: versions, devices, the commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_LIBRARIES = ("saap_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def provenance() -> dict[str, Any]:
    """Note what a reader needs to repeat a run: `versions`, `devices` and `git_commit` (None outside a checkout).

    `devices` has `platform`, `kind` and `count` of jax's devices, and how many `cores` of this host the run may use.
    """
    import jax  # here, so that reading a report starts no accelerator

    devices = jax.devices()
    kinds: dict[str, Any] = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    kinds["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"versions": versions(), "devices": kinds, "git_commit": git_commit(Path(__file__).parent)}


def computed_by() -> list[Any]:
    """Note what numbers depend on beside their inputs: versions of libraries, and the kind of jax's devices."""
    import jax

    return [versions(), jax.devices()[0].device_kind]


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that results depend on, None of one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def git_commit(directory: Path) -> str | None:
    """Return the commit that a directory is checked out at, with "-dirty" if files differ, or None.

    None is for a directory that git does not track, such as a library installed below somebody else's checkout.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=directory, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
