"""The console script `saap`, and `python -m saap_jax`: the command line as a process of its own, which signals end.

Nothing is imported before signals are handled: most of a second, or many on a busy machine, goes into imports.
"""

import sys

from saap_jax.runtime import interrupts


def run() -> None:
    """Run `saap`, and end the process."""
    interrupts.run(_main)


def _main() -> int:
    from saap_jax.runtime.programs import keep_programs

    keep_programs(sys.argv[1:])
    from saap_jax.cli.main import main

    return main()


if __name__ == "__main__":
    run()
