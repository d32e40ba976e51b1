"""SAAP's table of LLaMA-13B (arXiv:2412.15127), 20 % and 50 %, beside the peers that it names.

    saap compare papers/saap_llama_13b

Protocol: calibrated on 10 windows of 64 tokens of BookCorpus (`text/bookcorpus.jsonl` below `SAAP_DATA`, a line
`{"text": ...}` a document; no copy of it is part of this project); ppl@128 of all of WikiText-2 (raw test) and of Penn
Treebank (valid), and seven zero-shot tasks (`saap evaluate --tasks boolq piqa hellaswag winogrande arc_easy
arc_challenge openbookqa` of what was cut). The ratio is of the parameters of attention and MLP.

Published: SAAP claims 2.39 points of mean accuracy more than its best baseline.

Machine: v5e:4x4 (`saap plan llama-13b v5e:4x4`; docs/scale.md has the others). Neither was run here: no such model and
no such machine are at hand.
"""

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig

PLANNED = "llama-13b"
"""What `saap plan` calls a model of this size."""

CONFIG = CompareConfig(
    name="saap-llama-13b",
    model=ModelConfig(name="huggyllama/llama-13b", dtype="bfloat16"),
    calibration=CalibrationConfig(
        scenarios=("bookcorpus=jsonl:text/bookcorpus.jsonl#text",), examples=10, length=64, bos="never", batch_size=2
    ),
    methods=("random", "saap", "default", "llm-pruner-param-first", "llm-pruner-param-second", "flap", "wanda-sp"),
    evaluation=EvaluationConfig(
        in_domain="ptb:ptb/valid.txt", out_of_domain="wikitext:wikitext2/test.txt", windows=0, length=128, bos="never"
    ),
    ratios=(0.2, 0.5),
    mesh=MeshConfig(fsdp=2, tensor=8),
)
