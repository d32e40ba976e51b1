"""A run as TensorBoard scalars, written anew from its records by `tensorboardX`, so no TensorFlow is needed.

`FIELD/STAGE` at step 0, `candidates/METRIC` at the candidate's number, `training/FIELD` at its step.
"""

import shutil
from pathlib import Path

from saap_jax.runs.directory import RunDirectory
from saap_jax.runtime.processes import is_primary

DIRECTORY = "tensorboard"
_STAGE = ("seconds", "compile_seconds", "compiles", "peak_host_gib", "peak_device_gib", "tokens", "tokens_per_second")
_TRAINING = ("loss", "held_out", "divergence", "norm", "learning_rate", "tokens_per_second")


def write_scalars(run: RunDirectory) -> Path:
    """Write the scalars of a run, finished or not, in place of those that are there; what was not recorded has none."""
    path = run.claim(DIRECTORY)
    candidates = run.candidates()
    if is_primary():
        from tensorboardX import SummaryWriter  # here: it imports torch where there is one

        shutil.rmtree(path, ignore_errors=True)
        with SummaryWriter(str(path)) as writer:
            for stage in run.record.get("stages", []):
                for field in _STAGE:
                    if (value := stage.get(field)) is not None:
                        writer.add_scalar(f"{field}/{stage['name']}", value, 0)
            for number, row in enumerate(candidates, start=1):
                for metric, ppl in row.get("ppl", {}).items():
                    writer.add_scalar(f"candidates/{metric}", ppl, number)
                for field in _TRAINING if "step" in row else ():
                    if (value := row.get(field)) is not None:
                        writer.add_scalar(f"training/{field}", value, row["step"])
    return path
