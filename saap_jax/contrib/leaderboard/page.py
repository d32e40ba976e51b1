"""The leaderboard: tables of JSON files that `saap enter` writes. Who stands where is said by the race.

    python -m saap_jax.contrib.leaderboard.page leaderboard/judged

prints the tables as Markdown.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap_jax.errors import reading
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.race import race_state
from saap_jax.evaluation.scales import PERPLEXITY, format_ppl
from saap_jax.report.blocks import Column, Table
from saap_jax.report.formats import BEST, TIED, marked, with_interval
from saap_jax.report.render import markdown_text
from saap_jax.runtime.files import read_json
from saap_jax.runtime.words import plural

EXAMPLES = 128
MINUTES = 10.0
"""Windows of calibration text, and processor minutes, that a method may take."""
DENSE = "dense"
JUDGED = "judged"

Entry = dict[str, Any]
"""A file: `name`, `idea`, `author`, `chain`, `date`, `commit`, `versions`, `text`, `seeds`, `judged`, the losses of the
windows of the unpruned model (`dense`), and by ratio, of each seed, `losses`, `minutes` and `parameters`."""


def read_entries(directory: Path) -> list[Entry]:
    """Read the entries of a directory.

    Raises:
        ValueError: a damaged entry; a file of something else is left out.
    """
    entries = []
    for path in sorted(directory.glob("*.json")):
        with reading(path, "an entry of the leaderboard; write it anew with saap enter"):
            entry = read_json(path)
            if not isinstance(entry, dict) or "ratios" not in entry:
                continue
            for runs in entry["ratios"].values():
                shape = np.shape([run["losses"] for run in runs])
                if shape != (len(entry["seeds"]), len(entry[DENSE])):
                    raise ValueError(f"losses of shape {shape}")
            entries.append({**entry, "about": [entry["text"], entry["seeds"]]})
    return entries


def leaderboard(entries: Sequence[Entry], ratio: float) -> Table:
    """Rank the entries of a ratio that were judged on the text and the seeds of the newest, and let them race.

    An entry that took more than `MINUTES` is not ranked. Figures are exp of the mean loss over windows and seeds, with
    the interval of `evaluation.differences`.
    """
    there = [entry for entry in entries if f"{ratio:g}" in entry["ratios"]]
    columns = [
        Column("method", ("name", "best", "tied"), marked, True),
        Column("perplexity", ("value", "low", "high"), lambda *each: with_interval(*each[:3], form=format_ppl)),
        Column("minutes", ("minutes",), lambda value: f"{value:.1f}"),
        Column("chain", ("chain",), words=True, wide=True),
        Column("date", ("date",), words=True),
        Column("commit", ("commit",), lambda commit: commit[:7], True, True),
        Column("author", ("author",), words=True),
    ]
    title = f"{100 * ratio:g} % of the prunable parameters gone"
    if not there:
        return Table(title, columns, [], ["No entry yet."])
    newest = max(there, key=lambda entry: entry["date"])
    rows = [
        {**entry, **_figure([run["losses"] for run in runs]), "minutes": max(run["minutes"] for run in runs)}
        for entry in there
        if entry["about"] == newest["about"]
        for runs in [entry["ratios"][f"{ratio:g}"]]
    ]
    rows.sort(key=lambda row: (row["minutes"] > MINUTES, np.nan_to_num(row["losses"].mean(), nan=np.inf)))
    racing = [row["losses"] for row in rows if row["minutes"] <= MINUTES]
    for number in race_state(racing, [len(newest[DENSE])]).left if racing else ():
        rows[number] |= {"best": number == 0, "tied": number > 0}
    late = rows[len(racing) :]
    others = [entry for entry in there if entry["about"] != newest["about"]]
    (calibration, metric, _) = newest["text"]
    draws = plural(len(newest["seeds"]), "draw")
    notes = [
        f"{metric}, {len(newest[DENSE])} windows; calibrated on {EXAMPLES} windows of {calibration}, {draws}. "
        "Intervals of 95 % are over windows and draws.",
        f"{BEST} lowest; {TIED} the race over the windows does not tell it from the lowest (5 %).",
    ]
    for left_out, why in ((late, f"took more than {MINUTES:g} processor minutes"),
                          (others, "were judged on other windows or draws")):  # fmt: skip
        if left_out:
            notes.append(f"Not ranked, since they {why}: {', '.join(entry['name'] for entry in left_out)}.")
    unpruned = {"name": "unpruned", **_figure([newest[DENSE]]), "mark": "dense"}
    return Table(title, columns, [*rows, unpruned], notes)


def _figure(losses: list[list[float]]) -> dict[str, Any]:
    """The perplexity of losses, seeds by windows, with its interval."""
    values = np.array(losses, np.float64)
    ends = zip(("value", "low", "high"), paired_difference(values, np.zeros_like(values))[:3], strict=True)
    return {"losses": values, "best": False, "tied": False} | {name: PERPLEXITY.value(end) for name, end in ends}


if __name__ == "__main__":
    found = read_entries(Path(sys.argv[1]))
    print(markdown_text(leaderboard(found, ratio) for ratio in (0.5, 0.2)), end="")
