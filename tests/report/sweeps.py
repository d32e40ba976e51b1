"""Invented comparisons with all records that a run keeps; the benchmark of the report's size makes them."""

import runpy
from collections.abc import Callable
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmarks" / "report_size.py"

write_run: Callable[[Path, int, int], Path] = runpy.run_path(str(BENCHMARK))["write_run"]
"""Write a run of so many candidates: directory, seed, candidates."""
