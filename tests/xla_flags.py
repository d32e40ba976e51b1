"""Flags of XLA with which the suite compiles: it imports nothing that reads them."""

from importlib.metadata import version
from importlib.util import find_spec

# The suite compiles thousands of tiny programs and runs each a few times: optimising them costs more than it saves.
# Splitting a program for other cores gains nothing beside other workers; code for fusions by another compiler takes
# longer than the rest together (jaxlib 0.12 knows no other way, and refuses the flag; so does libtpu, which reads the
# flags too where it is there).
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + ("" if find_spec("libtpu") else " --xla_cpu_parallel_codegen_split_count=1")
    + ("" if find_spec("libtpu") or version("jaxlib") >= "0.11" else " --xla_cpu_use_fusion_emitters=false")
)


def cheaper(given: str) -> str:
    """Return XLA_FLAGS with the cheap ones, unless some are given that let programs be optimised.

    >>> cheaper("--xla_force_host_platform_device_count=8")
    '--xla_force_host_platform_device_count=8'
    """
    wanted = not given or "--xla_backend_optimization_level=0" in given  # the latter in `make sharded`
    return f"{given} {CHEAP}".strip() if wanted and CHEAP not in given else given
