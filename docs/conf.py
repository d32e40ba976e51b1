"""The documentation site: `make docs` builds it into build/site.

SAAP_REPOSITORY, the web address of the repository, adds Colab to the notebooks and points links of sources to it.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from saapsite.sources import linkcode_resolve  # noqa: E402, F401

from saap_jax import __version__  # noqa: E402

project = "saap_jax"
author = "the authors of saap_jax"
project_copyright = "the authors of saap_jax, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "saapsite.docstrings",
    "saapsite.mathml",
    "saapsite.pages",
    "saapsite.reports",
    "saapsite.sources",
]
exclude_patterns = ["_ext", "_static"]

saapsite_repository = os.environ.get("SAAP_REPOSITORY", "")
saapsite_colab = "https://colab.research.google.com/github/{repository}/blob/gh-pages/{notebook}"
"""Where Colab finds a notebook, once the site is on the branch gh-pages of `{repository}`, OWNER/NAME."""
saapsite_runs = str(HERE.parent / "build" / "notebooks")

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

Path(saapsite_runs).mkdir(parents=True, exist_ok=True)
os.environ["SAAP_NOTEBOOKS"] = saapsite_runs  # where notebooks leave their runs
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebook-cache")
nb_execution_timeout = 1800  # seconds a cell, of a busy machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress, and warnings about widgets
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
suppress_warnings = ["ref.python"]  # names of options in signatures, which several classes have
nitpick_ignore_regex = [("py:.*", r".*")]  # names in signatures, which the reference does not list

highlight_language = "none"  # of blocks that name none: most are commands
html_theme = "sphinx_book_theme"
html_title = "saap_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
}
