"""What jax compiles, kept in the user's cache folder, so that the next command of the same shapes compiles nothing.

jax keeps its programs by what they compute, its version, flags and the machine; it imports this from the environment.
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saap_jax.runtime.files import cache, write_atomically

MOST = 2 * 2**30
"""Bytes of programs that are kept: when a command begins, those go that were not used for longest."""


def cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_programs(words: Sequence[str] = ()) -> None:
    """Have jax, which must not be imported yet, keep what it compiles; whatever is wrong with the folder stops nobody.

    Processes of one job (`words` of the command line that begin with `--distributed`) keep programs only where the user
    names a folder, which all of them have to share: on GPUs they wait for each other while they compile.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # half written by who was killed, or thrown away meanwhile: it is compiled
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or any(word.startswith("--distributed") for word in words):
        return
    with contextlib.suppress(OSError, RuntimeError):  # no place to write, no home
        kept = cache() / "programs"
        # Programs for a CPU are cut into parts for its cores, which is no part of the name that jax gives them.
        folder = kept / os.environ.get("NPROC", str(cores()))
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        trim(kept, MOST)


def trim(folder: Path, most: int) -> None:
    """Remove empty files, and those that were not used for longest, until at most `most` bytes are left."""
    files = [(path, path.stat()) for path in folder.rglob("*-cache")]
    left = sum(about.st_size for _, about in files)
    for path, about in sorted(files, key=lambda each: (each[1].st_size > 0, each[1].st_atime)):
        if about.st_size and left <= most:
            break
        path.unlink(missing_ok=True)
        left -= about.st_size


def remembered(about: Any, make: Callable[[], Any]) -> Any:
    """Make a JSON value, or read that which is kept with the programs under what it is made from."""
    import jax

    settings: Any = jax.config  # whose fields no checker of types knows
    folder = settings.jax_compilation_cache_dir
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    if not folder or not settings.jax_enable_compilation_cache or "://" in folder:
        return make()
    path = Path(folder) / f"{name}-cache"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    value = make()
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(value).encode())
    return value
