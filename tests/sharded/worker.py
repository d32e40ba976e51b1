"""One process of a job, as a test starts it: `python worker.py PORT PROCESSES PROCESS JOBS.json`.

Each job is the words of a command; all run in the same processes, because to start one takes longer than its job.
"""

import json
import sys
from pathlib import Path


def main(port: str, processes: str, process: str, jobs: str) -> int:
    """Join the others, and run the jobs until one fails."""
    from saap_jax.cli import main as cli
    from saap_jax.runtime.processes import Cluster, join, leave

    join(Cluster(f"127.0.0.1:{port}", int(processes), int(process)))
    for words in json.loads(Path(jobs).read_text()):
        if code := cli.main(words):
            return code
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
