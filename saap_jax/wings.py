"""What most jobs do without, by name: wings, contrib and some of the core, imported when it is asked for.

The core needs no wing and nothing of contrib to compare, prune, score and evaluate a LLaMA.
"""

import importlib
from typing import Any

WINGS: dict[str, str] = {
    "open_problem": "trace.subject.subject:open_problem",
    "couplings_of": "trace.listing:couplings_of",
    "checked_losses": "trace.subject.pruned:checked_losses",
    "own_code": "trace.subject.pruned:own_code",
    "forms_of": "export.hf:forms_of",
    "check_group_size": "recovery.quantization:check_group_size",
    "writer": "llama.generate",
    "write_report": "report.write:write_report",
    "start_race": "jobs.racing:start_race",
    "race_ratios": "jobs.racing:race_ratios",
    "costs": "evaluation.cost",
    "tfds": "data.tfds_source",
    "load_model": "llama.files.load:load_model",
    "load_tokenizer": "llama.files.tokenizer:load_tokenizer",
    "comparison_page": "report.pages.compare",
    "statistics_files": "estimation.storage",
    "fusion_section": "report.pages.score:fusion_section",
    "targets": "contrib.targets",
    "suggestions_of": "contrib.suggestions:suggestions_of",
    "open_orbax": "contrib.trainers.read:open_orbax",
    "trainers_read": "contrib.trainers.read",
    "trainers_write": "contrib.trainers.write",
}
"""Name -> place of what it stands for, see `imported`."""


def wing(name: str) -> Any:
    """Import what has a name in `WINGS`."""
    return imported(WINGS[name])


def imported(place: str) -> Any:
    """Import what lies at a place below `saap_jax`: `config.jobs:CompareConfig`, or the module `jobs.compare`."""
    module, _, name = place.partition(":")
    found = importlib.import_module(f"saap_jax.{module}")
    return getattr(found, name) if name else found
