"""Turn local text into a TensorFlow data set, in the format that needs no TensorFlow to read: array_record.

    python -m saap_jax.data.tfds_builder NAME SOURCE [SOURCE ...] [--validation 0.05] [--data-dir DIR] [--version 1.0.0]

Each document of the sources becomes an example with the text features `text` and `name`; `tfds:NAME` is then a source
like any other. Whole documents go to the split `validation`, the same ones every time.
"""

import argparse
import contextlib
import hashlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from saap_jax.data.sources import Document, read_texts
from saap_jax.data.tfds_source import data_directory


def build_data_set(
    name: str,
    sources: Sequence[str],
    *,
    validation: float = 0.05,
    data_dir: str | Path | None = None,
    version: str = "1.0.0",
) -> Path:
    """Write the documents of text sources as a TFDS data set `data_dir/name/version`; return that directory.

    Args:
        sources: text sources, see `sources`; of a built-in one, the calibration part.
        validation: share of the documents that make the split `validation`, chosen by their place and text; 0 for none.
        data_dir: where data sets are; None: what TFDS_DATA_DIR names.

    Raises:
        ValueError: a name that TFDS does not take, no document for a split, or the version is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"name: expected small letters, digits and single underscores, got {name!r}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"version: expected three numbers, such as 1.0.0, got {version!r}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation: expected a share in [0, 1), got {validation}")
    root = Path(data_dir) if data_dir is not None else data_directory()
    target = root / name / version
    if target.exists():
        raise ValueError(f"expected no data set at {target} yet, found one; choose another --version or --name")
    documents = [document for source in sources for document in read_texts(source, "calibration")]
    splits = split_documents(documents, validation)
    try:
        _prepare(name, splits, root, version, sources)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def split_documents(documents: Sequence[Document], validation: float) -> dict[str, list[Document]]:
    """Return the documents of each split: those of the lowest digests of place and text are `validation`.

    Raises:
        ValueError: a split would be empty.
    """
    digests = [hashlib.sha256(f"{place} {each.text}".encode()).digest() for place, each in enumerate(documents)]
    held = set(sorted(range(len(documents)), key=lambda place: digests[place])[: round(validation * len(documents))])
    splits = {
        "train": [each for place, each in enumerate(documents) if place not in held],
        "validation": [each for place, each in enumerate(documents) if place in held],
    }
    if validation == 0:
        del splits["validation"]
    for split, members in splits.items():
        if not members:
            raise ValueError(
                f"validation: expected a document or more for the split {split}, got none of {len(documents)} at a "
                f"share of {validation}; give more documents or another share"
            )
    return splits


def _prepare(name: str, splits: dict[str, list[Document]], root: Path, number: str, sources: Sequence[str]) -> None:
    import tensorflow_datasets as tfds  # here: it takes a moment, and most users of this package's data never do

    class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(number)
        code_path = None  # there are no files beside this code, which TFDS would look for

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, description=f"Text of {', '.join(sources)}.")

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
            return {split: enumerate(document._asdict() for document in each) for split, each in splits.items()}

        def _generate_examples(self) -> Iterator:
            raise NotImplementedError("every split has its own generator")

    LocalText.name = name
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder = LocalText(data_dir=str(root), file_format="array_record")
        builder.download_and_prepare(download_dir=unused)  # which TFDS makes although nothing is downloaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for bad input, with one line on the error stream."""
    parser = argparse.ArgumentParser(prog="python -m saap_jax.data.tfds_builder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--validation", type=float, default=0.05)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--version", default="1.0.0")
    options = parser.parse_args(argv)
    try:
        made = build_data_set(**vars(options))
    except (ValueError, OSError) as error:
        print(f"tfds_builder: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"data set: {made}   source: tfds:{options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
