"""Turn local text into a TensorFlow data set, in the format that needs no TensorFlow to read: array_record.

    python experiments/tfds_builder.py NAME SOURCE [SOURCE ...] [--validation 0.05]

Each document of the sources (of built-in ones, of their calibration part) becomes an example with the text features
`text` and `name`, below TFDS_DATA_DIR; `tfds:NAME` is then a source like any other. Whole documents go to the split
`validation`, the same ones every time: those of the lowest digests of place and text.
"""

import argparse
import contextlib
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from saap_jax.data.sources import read_texts


def build_data_set(name: str, sources: Sequence[str], root: Path, validation: float = 0.05) -> Path:
    """Write the documents of text sources as the data set `root/name/1.0.0`; return that directory.

    Raises:
        ValueError: no document for a split, or the data set is there already.
    """
    import tensorflow_datasets as tfds

    target = root / name / "1.0.0"
    if target.exists():
        raise ValueError(f"expected no data set at {target} yet, found one; choose another name")
    documents = [document for source in sources for document in read_texts(source, "calibration")]
    digests = [hashlib.sha256(f"{place} {each.text}".encode()).digest() for place, each in enumerate(documents)]
    order = sorted(range(len(documents)), key=lambda place: digests[place])
    held = round(validation * len(documents))
    places = {"train": sorted(order[held:])} | ({"validation": sorted(order[:held])} if validation else {})
    if not all(places.values()):
        raise ValueError(f"validation: {validation} of {len(documents)} documents leaves a split empty; give more")

    class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there are no files beside this code, which TFDS would look for

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, description=f"Text of {', '.join(sources)}.")

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
            return {
                split: enumerate(documents[place]._asdict() for place in members) for split, members in places.items()
            }

        def _generate_examples(self) -> Iterator:
            raise NotImplementedError("every split has its own generator")

    LocalText.name = name
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder = LocalText(data_dir=str(root), file_format="array_record")
        builder.download_and_prepare(download_dir=unused)  # which TFDS makes although nothing is downloaded
    return target


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--validation", type=float, default=0.05)
    options = parser.parse_args()
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    try:
        made = build_data_set(options.name, options.sources, root, options.validation)
    except (ValueError, OSError) as error:
        sys.exit(f"tfds_builder: {' '.join(str(error).split())}")
    print(f"data set: {made}   source: tfds:{options.name}")


if __name__ == "__main__":
    main()
