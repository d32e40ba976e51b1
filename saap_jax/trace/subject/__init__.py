"""A model that has never heard of this library, traced: gates by interpretation of its program.

`problem` what is pruned, its losses, the cut model · `observe` the calibration pass · `compensation` least squares ·
`saved` the cut model as a directory · `subject` all of it as a `Subject` · `pruned` all of the method as one call.
"""

from saap_jax.trace.subject.problem import cut
from saap_jax.trace.subject.saved import load_pruned
from saap_jax.trace.subject.subject import TracedSubject, subject_of

__all__ = ["TracedSubject", "cut", "load_pruned", "subject_of"]
