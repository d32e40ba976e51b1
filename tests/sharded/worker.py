"""One process of a job, as a test starts it: `python worker.py PORT PROCESSES PROCESS DEVICES JOBS.json`.

Each job is the words of a command; all run in the same processes, because to start one takes longer than its job.
"""

import json
import os
import sys
from pathlib import Path

port, processes, process, devices, jobs = sys.argv[1:]
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

from saap_jax import cli  # noqa: E402  (after the flags)
from saap_jax.processes import Cluster, join, leave  # noqa: E402

join(Cluster(f"127.0.0.1:{port}", int(processes), int(process)))
for words in json.loads(Path(jobs).read_text()):
    if code := cli.main(words):
        sys.exit(code)
leave()
