"""The pipeline for a model that has never heard of this library: traced, scored, searched, judged, cut and saved.

`subject` what is pruned · `observe` the calibration pass · `ablation` the oracle · `select` scores to keep-sets ·
`saved` the cut model as a directory · `pruned` all of it as one call. Estimators, fusion, stability, search and solver
are the library's.
"""

from saap_jax.traced.saved import load_pruned, save_pruned
from saap_jax.traced.select import calibrate, select
from saap_jax.traced.subject import Losses, Subject, cut, subject_of

__all__ = ["Losses", "Subject", "calibrate", "cut", "load_pruned", "save_pruned", "select", "subject_of"]
