"""Checkpoints of a training that is going on: written by orbax in the background, whole or not at all.

A checkpoint `STEP/` holds `state` (the trainable parameters, the optimiser's state and the step, by path) and
`progress`: where the data iterator is, the random key, what held-out losses were so far, what identifies the frozen
model (a digest of all of its arrays) and the configuration. Frozen parameters are not in it. The latest ones and the
best one are kept.
"""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from saap_jax.recovery.train import State
from saap_jax.runtime.errors import UnreadableFileError, one_line, reading
from saap_jax.runtime.processes import is_primary

SCHEMA = 1
"""Version of what a checkpoint holds."""


class Saved(NamedTuple):
    """A checkpoint that was read back."""

    state: State
    progress: dict[str, Any]


_WHOLE = "a whole checkpoint (remove it to go on from the one before it, or start anew with --overwrite)"

_QUIET, _ROUNDS = 5, 100
"""Rounds of 50 ms without a new directory after which a failed writer counts as done; rounds at most."""


class Checkpoints:
    """The checkpoints of one run, in a directory of their own. Close it, or use it in a `with` statement."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp  # here: it takes most of a second
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        def rank(metrics: Any) -> Any:  # of equal losses the first is the best, as for whoever reads it
            return metrics["loss"], metrics.get("step", 0)

        # A line for each file that is written, otherwise; and what fails in the background is raised later, by `wait`.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        best = BestN(get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._ocp, self._directory, self._failed = ocp, directory, False
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, state: State, progress: dict[str, Any], loss: float | None) -> None:
        """Copy a state and begin to write it; the state may be donated as soon as this returns.

        Args:
            loss: on held-out text, by which the best checkpoint is known; None where none is held out.
        """
        args = self._ocp.args
        with self._writing():
            self._manager.save(
                int(state.step),
                args=args.Composite(
                    state=args.StandardSave(arrays_of(state)), progress=args.JsonSave({"schema": SCHEMA, **progress})
                ),
                metrics=None if loss is None else {"loss": loss, "step": int(state.step)},
            )

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: something could not be, as on a full disk; what was begun is removed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all is written, and end the threads that write; see `wait`."""
        try:
            with self._writing():
                self._manager.close()
        finally:
            if self._failed and is_primary():  # one part of a checkpoint: the threads that write the others go on
                quiet = 0
                for _ in range(_ROUNDS):
                    time.sleep(0.05)
                    quiet = 0 if self._remove_begun() else quiet + 1
                    if quiet == _QUIET:
                        break

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise an error of the system as what it is: orbax raises others, with its number in the text."""
        try:
            yield
        except Exception as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None and not isinstance(error, OSError):
                raise
            code = int(number[1]) if number is not None else getattr(error, "errno", None)
            self._failed = True
            self._remove_begun()
            if code is None:
                raise
            raise OSError(code, os.strerror(code), str(self._directory)) from error

    def _remove_begun(self) -> bool:
        """Remove checkpoints that were begun; say whether there were any."""
        begun = list(self._directory.glob("*.orbax-checkpoint-tmp*")) if is_primary() else []
        for each in begun:
            shutil.rmtree(each, ignore_errors=True)
        return bool(begun)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints that are kept."""
        self.wait()
        return sorted(self._manager.all_steps())

    def progress(self, step: int) -> dict[str, Any]:
        """Read the progress of a checkpoint.

        Raises:
            ValueError: it was written by another version, or damaged.
        """
        args = self._ocp.args
        with reading(self._directory / str(step), _WHOLE):
            progress = self._manager.restore(step, args=args.Composite(progress=args.JsonRestore()))["progress"]
        if not isinstance(progress, dict) or progress.get("schema") != SCHEMA:
            raise ValueError(
                f"checkpoint {step}: expected schema {SCHEMA}, got {str(progress)[:80]}; it was written by "
                "another version of saap_jax: start anew with --overwrite"
            )
        return progress

    def read(self, step: int, like: State) -> Saved:
        """Read a checkpoint back, to the last bit.

        Args:
            like: a state of the same training.

        Raises:
            ValueError: the checkpoint is of other parameters, or damaged.
        """
        progress, args = self.progress(step), self._ocp.args
        wanted = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, arrays_of(like))
        with reading(self._directory / str(step), _WHOLE):
            try:
                restored = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(wanted)))
            except (ValueError, KeyError) as error:
                raise UnreadableFileError(
                    f"checkpoint {step}: expected the parameters that are trained now, found others "
                    f"({one_line(error)}); start anew with --overwrite"
                ) from None
        return Saved(with_arrays(like, restored["state"]), progress)


def arrays_of(state: State) -> dict[str, Any]:
    """Collect the arrays of a state by path; empty ones, which orbax refuses to write, are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves if leaf.size}


def with_arrays(like: State, arrays: dict[str, Any]) -> State:
    """Put into a state the arrays of `arrays_of`; empty ones are those of `like`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    values = [jnp.asarray(arrays[_name(path)]) if leaf.size else leaf for path, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, values)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
