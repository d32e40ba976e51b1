"""The configuration of `saap plan`: a model, a machine, a task, and how the machine is used."""

import dataclasses
from typing import Literal

from saap_jax.config.checks import check_at_least, check_choices
from saap_jax.config.mesh import MeshConfig
from saap_jax.types import AttentionPath, Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Does a job fit a machine, and how long does it take? Compiled for the machine, which need not be there."""

    model: str = "llama-2-7b"
    """Name of a known model, a config.json, or a directory that has one."""
    target: str = "v5e-16"
    """Machine: `v5e:4x4` or `v5e-16` (kinds v4, v5e, v5p, v6e, tpu7x), or by arithmetic alone `gpu:h100:8` (also a100,
    h200, b200) and `tpu:8t:256` (also 8i)."""
    task: Literal["score", "evaluate", "recover"] = "score"
    """What is to be done."""
    estimators: tuple[str, ...] = ("gate_fisher", "taylor_element", "taylor_element_second", "wanda")
    """Of `score`: the estimators; what they need of the text decides the memory."""
    method: Literal["groupwise", "lora", "full"] = "lora"
    """Of `recover`: the method."""
    examples: int = 128
    """Rows of the calibration, evaluation or training text."""
    length: int = 2048
    """Tokens a row."""
    batch: int = 0
    """Rows at once, on all chips together; 0: one for each part that the mesh splits a batch into."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters; statistics and what is trained are float32."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks`, `splash` or `auto`, as `saap help score` says of
    `model.attention`."""
    remat: Remat = "full"
    """What the backward pass computes again."""
    mesh: MeshConfig = MeshConfig(fsdp=-1)
    """How the chips are arranged."""
    search: bool = False
    """Find the smallest machine of the target's kind that the job fits, and the fastest way to use it."""
    cache: bool = True
    """Keep and use results of earlier plans, below SAAP_CACHE or the user's cache directory."""
    json: str = ""
    """File that the result is written to; empty: none."""

    def __post_init__(self) -> None:
        check_choices("plan", self)
        for name in ("examples", "length"):
            check_at_least(name, getattr(self, name), 1 if name == "examples" else 2)
        check_at_least("batch", self.batch, 0)
        if not self.estimators:
            raise ValueError("estimators: expected at least one estimator, got none")
