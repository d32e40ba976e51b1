"""Whether a finished run is still of the model and the text that are there now.

A finished run is shown at once. So what it was of is read again only where a file was written since the run began;
else a look at the files' dates is all. Dates are of files on this machine: for a model at an address or of the hub,
and for what the code of a factory reads, nothing is said.
"""

import contextlib
import datetime
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from saap_jax.config.jobs import FidelityConfig, ScoreConfig, SensitivityConfig, SweepConfig
from saap_jax.config.method import ModelConfig
from saap_jax.data.sources import source_files
from saap_jax.data.windows import parse_scenario
from saap_jax.errors import Doubt
from saap_jax.llama.files.sources import local_files
from saap_jax.records import RunRecord
from saap_jax.runs.directory import RunDirectory
from saap_jax.runtime.processes import count
from saap_jax.runtime.sources import user_sources
from saap_jax.runtime.words import some

Config = SweepConfig | SensitivityConfig | FidelityConfig | ScoreConfig
"""Of the jobs that calibrate a model of ours and keep a run."""


def changed_inputs(record: RunRecord, inputs: Mapping[str, str]) -> list[str]:
    """Name what a run was of, by the digests of its record, and what is another now."""
    before = record.get("inputs", {})
    return [name for name, now in inputs.items() if before.get(name, now) != now]


def warn_of_changes(config: Config, run: RunDirectory, read: Callable[[], Mapping[str, str]]) -> None:
    """Warn where the model or a text is another now than a finished run was of; files that are gone are none of it.

    Args:
        read: digests what is there now; called only where a file has been written since the run began.
    """
    if count() > 1:  # they would have to agree on what each of them finds
        return
    changed = []
    with contextlib.suppress(Exception):  # the run is shown whatever has become of its model
        if _written_since(config, run.record):
            changed = changed_inputs(run.record, read())
    if changed:
        warnings.warn(
            f"{run.path}: what is shown is of another {some(changed)} than is there now, by the digests; pass "
            "--overwrite or another --name to measure what is there now",
            Doubt,
            stacklevel=2,
        )


def _written_since(config: Config, record: RunRecord) -> bool:
    began = datetime.datetime.fromisoformat(record["started"]).timestamp()  # to the second
    for file in _files(config):
        for about in (file.stat(), file.lstat()):  # of a link, what it leads to and itself
            if max(about.st_mtime, about.st_ctime) >= began:  # the latter where an older file took its place
                return True
    return False


def _files(config: Config) -> Iterator[Path]:
    """Yield the files of a model and of texts that are on this machine."""
    yield from _model_files(config.model)
    sources = []
    if not config.model.traced:
        sources = [parse_scenario(text).source for text in config.calibration.scenarios]
    if isinstance(config, SweepConfig | SensitivityConfig) and not config.model.traced:
        sources += [config.evaluation.in_domain, config.evaluation.out_of_domain]
    for source in sources:
        yield from source_files(source)


def _model_files(model: ModelConfig) -> list[Path]:
    if not model.traced:
        return local_files(model.name)
    place = model.name.rpartition(":")[0]
    file = Path(place if place.endswith(".py") else f"{place.replace('.', '/')}.py")
    if file.is_file():
        return user_sources(file)
    return []
