"""Checkpoints of a training that is going on: written by orbax in the background, whole or not at all.

A checkpoint `STEP/` holds `state` (the trainable parameters, the optimiser's state and the step, by path) and
`progress`: where the data iterator is, what held-out losses were so far, what identifies the frozen model (a digest of
all of its arrays) and the configuration. Frozen parameters are not in it. The latest ones and the best one are kept.
"""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from saap_jax.errors import reading
from saap_jax.recovery.train import TrainingState
from saap_jax.runtime.processes import is_primary

_WHOLE = (
    "a whole checkpoint of the parameters that are trained now (remove it to go on from the one before it, or start "
    "anew with --overwrite)"
)

_QUIET = 5
"""Rounds of 50 ms without a new directory after which a failed writer counts as done."""


class _Best:
    """Keeps the best checkpoint, a policy of orbax's; by its step, since orbax forgets losses when a process ends."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Say which of some checkpoints stay."""
        return [each.step == self.step for each in checkpoints]


class Checkpoints:
    """The checkpoints of one run, in a directory of their own. Use it in a `with` statement, which waits for all."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp  # here: it takes most of a second
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

        # A line for each file that is written, otherwise; and what fails in the background is raised later, by `wait`.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp = ocp
        self._directory = directory
        self._failed = False
        self._best = _Best()
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep), self._best]),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._writing():
                self._manager.close()
        finally:
            quiet = 0 if self._failed and is_primary() else _QUIET
            while quiet < _QUIET:  # one part of a checkpoint failed: the threads that write the others go on
                begun = list(self._directory.glob("*.orbax-checkpoint-tmp*"))
                for each in begun:
                    shutil.rmtree(each, ignore_errors=True)
                quiet = 0 if begun else quiet + 1
                time.sleep(0.05)

    def save(self, state: TrainingState, progress: dict[str, Any]) -> None:
        """Copy a state and begin to write it; the state may be donated as soon as this returns.

        Args:
            progress: its `best_step` stays, beside the latest.
        """
        args = self._ocp.args
        step = int(state.step)
        items = args.Composite(state=args.StandardSave(arrays_of(state)), progress=args.JsonSave(progress))
        self._best.step = progress.get("best_step")
        with self._writing():
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: something could not be, as on a full disk; what was begun is removed at the end.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise an error of the system as what it is: orbax raises others, with its number in the text."""
        try:
            yield
        except Exception as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            self._failed |= number is not None or isinstance(error, OSError)
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(self._directory)) from error
            raise

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint that is whole; None if there is none."""
        return self._manager.latest_step()

    def progress(self, step: int) -> dict[str, Any]:
        """Read the progress of a checkpoint.

        Raises:
            ValueError: it is damaged.
        """
        args = self._ocp.args
        with reading(self._directory / str(step), _WHOLE):
            return dict(self._manager.restore(step, args=args.Composite(progress=args.JsonRestore()))["progress"])

    def read(self, step: int, like: TrainingState) -> TrainingState:
        """Read the state of a checkpoint back, to the last bit.

        Args:
            like: a state of the same training.

        Raises:
            ValueError: the checkpoint is of other parameters, or damaged.
        """
        args = self._ocp.args
        wanted = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, arrays_of(like))
        with reading(self._directory / str(step), _WHOLE):
            restored = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(wanted)))
            leaves, structure = jax.tree_util.tree_flatten_with_path(like)
            values = [jnp.asarray(restored["state"][_name(path)]) if leaf.size else leaf for path, leaf in leaves]
        return jax.tree_util.tree_unflatten(structure, values)


def arrays_of(state: TrainingState) -> dict[str, Any]:
    """Collect the arrays of a state by path; empty ones, which orbax refuses to write, are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves if leaf.size}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
