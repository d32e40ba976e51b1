"""Draw docs/figures/report.png: the top of the quickstart's report, in headless Chromium.

    make report.png            # after `make quickstart`

Whoever changes the report runs it again.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from saap_jax.report.write import write_reports

RUN, PICTURE = Path("runs/quickstart"), Path(__file__).parents[1] / "docs" / "figures" / "report.png"
SIZE = (1240, 1190)


def main() -> None:
    """Write the page of the run anew, and take its picture."""
    chromium = shutil.which("chromium") or sys.exit("report.png: expected Chromium on the path, found none")
    if not (RUN / "run.json").is_file():
        sys.exit(f"report.png: expected a finished run in {RUN}; make it by `make quickstart`")
    with tempfile.TemporaryDirectory() as directory:
        page, *_ = write_reports([RUN], Path(directory) / "report.html")
        size = "--window-size={},{}".format(*SIZE)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        subprocess.run([chromium, *options, f"--screenshot={PICTURE}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
