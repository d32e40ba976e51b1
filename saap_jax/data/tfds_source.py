"""Text of TensorFlow data sets that are prepared on this machine, read by random access, without TensorFlow or network.

    tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FIELD]        tfds:c4/en:3.0.1@train[:1%]#text        tfds:lm1b

SPLIT is TFDS's own notation, slices included (`train[:1000]`, `train[10%:20%]`, `train+validation`). Without one,
calibration and training read `train`, evaluation reads `validation`, or `test` where there is none. FIELD is a feature
of type text, by default `text`. Data sets are looked for below the directory that TFDS_DATA_DIR names (by default
`~/tensorflow_datasets`). They have to be in the format array_record, the one that needs no TensorFlow: prepare them by
`tfds build NAME --file_format=array_record`, or make one of local text by `experiments/tfds_builder.py`.
"""

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saap_jax.errors import reading
from saap_jax.extras import need

MOST = 100_000
"""Examples that a source may hold: they are read into memory. Larger splits have to be sliced."""

AT_ONCE = 1000
"""Examples that are read by one call."""


def parse_reference(source: str, path: str) -> tuple[str, str]:
    """Split what follows `tfds:` (without its field) into the data set, as TFDS names it, and the split, maybe empty.

    Raises ValueError where it is no such reference; no file is looked at.

    >>> parse_reference("", "c4/en:3.0.1@train[:1%]")
    ('c4/en:3.0.1', 'train[:1%]')
    """
    match = re.fullmatch(r"(\w+(?:/[\w.+-]+)?(?::\d+\.\d+\.\d+)?)(?:@([^@]+))?", path)
    if match is None:
        raise ValueError(
            f"data source {source!r}: expected tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FIELD], such as "
            "tfds:c4/en:3.0.1@train[:1%]#text"
        )
    return match[1], match[2] or ""


def read_examples(source: str, path: str, field: str, part: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each example of a split, in its order.

    Args:
        path: see `parse_reference`.
        field: the feature of type text.
        part: `evaluation`, `calibration` or `all`; it chooses the split where the reference names none.

    Raises:
        FileNotFoundError: the data set is not prepared here.
        ValueError: another file format; an unknown split or field; more than `MOST` examples.
    """
    where = f"data source {source!r}"
    (name, split) = parse_reference(source, path)
    need("tfds", where)
    with _quiet(), reading(where, "a prepared data set"):
        builder = _builder(name, where)
        kinds = {name: type(feature).__name__ for name, feature in builder.info.features.items()}
        if kinds.get(field) != "Text":
            found = ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items()))
            raise ValueError(
                f"{where}: expected a feature {field!r} of type Text, found features: {found}; name one as #FIELD"
            )
        splits = builder.info.splits
        if part == "evaluation":
            wanted = ("validation", "test")
        else:
            wanted = ("train",)
        split = split or next((each for each in wanted if each in splits), "")
        if not split:
            raise ValueError(
                f"{where}: expected a split {' or '.join(wanted)} for {part}, found {', '.join(splits)}; name one as "
                "@SPLIT"
            )
        with reading(where, f"a split of {', '.join(splits)}, or a slice of one, got {split!r}"):
            count = splits[split].num_examples
            records = builder.as_data_source(split=split)
    if count > MOST:
        raise ValueError(
            f"{where}: expected at most {MOST:,} examples, got {count:,}; take a slice, such as "
            f"@{split.split('[')[0]}[:{MOST}] ({MOST / count:.2%})"
        )
    for start in range(0, len(records), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(records)))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            text = record[field]
            yield f"{split} {row}", text.decode("utf-8") if isinstance(text, bytes) else str(text)


def _builder(name: str, where: str) -> Any:
    """Open a prepared data set from its files, whether or not its code is known."""
    from tensorflow_datasets.core.read_only_builder import builder_from_files
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    how = f"tfds build {name.partition(':')[0]}"
    try:
        builder = builder_from_files(name, data_dir=str(root))
    except DatasetNotFoundError:
        raise FileNotFoundError(
            f"{where}: expected the data set {name}, prepared below {root}, found none; name its directory in "
            f"TFDS_DATA_DIR, or prepare it there: {how} --data_dir={root} --file_format=array_record"
        ) from None
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        raise ValueError(
            f"{where}: expected files in the format array_record, got {kind.value if kind else 'none'} in "
            f"{builder.data_dir}; prepare the data set again: {how} --file_format=array_record"
        )
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing that TensorFlow is absent, which it is meant to be."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
