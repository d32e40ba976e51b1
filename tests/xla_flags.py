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


def forced(devices: int, flags: str = CHEAP) -> dict[str, str]:
    """Return the environment in which XLA makes so many devices of this CPU.

    Of NPROC it takes how many threads run programs. A collective holds its thread until the other devices have come; by
    default there are no more threads than devices, and those that hold one collective wait without end for those that
    hold another.

    >>> forced(4, "")
    {'XLA_FLAGS': '--xla_force_host_platform_device_count=4', 'NPROC': '16'}
    """
    return {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}".strip(),
        "NPROC": str(4 * devices),
    }


def cheaper(given: str) -> str:
    """Return XLA_FLAGS with the cheap ones, unless some are given that let programs be optimised.

    >>> cheaper("--xla_force_host_platform_device_count=8")
    '--xla_force_host_platform_device_count=8'
    """
    wanted = not given or "--xla_backend_optimization_level=0" in given  # the latter in `make sharded`
    return f"{given} {CHEAP}".strip() if wanted and CHEAP not in given else given
