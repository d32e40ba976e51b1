"""LLM-Pruner's table of LLaMA-7B (arXiv:2305.11627), 20 % and 50 %: its four rules.

    saap compare papers/llm_pruner_llama_7b

20 % is what its code calls a ratio of 0.25 in the layers 4 to 29: 0.203125 of all 32, by which 1,315,438,592 of
6,738,415,616 parameters go, as its repository reports.

Protocol: calibrated on 10 windows of 64 tokens of BookCorpus (`text/bookcorpus.jsonl` below `SAAP_DATA`, a line
`{"text": ...}` a document; no copy of it is part of this project); ppl@128 of all of WikiText-2 (raw test) and of Penn
Treebank (valid), and seven zero-shot tasks (`saap evaluate --tasks boolq piqa hellaswag winogrande arc_easy
arc_challenge openbookqa` of what was cut). The ratio is of the parameters of attention and MLP.

Published: dense 12.62 on WikiText-2 and 22.14 on Penn Treebank, 63.25 mean accuracy; 20 %, element-wise first order:
19.09, 34.21, 56.69 (after LoRA 17.58, 30.11, 59.23); 50 %: 112.44 on WikiText-2, 41.58 (after LoRA 38.12, 48.98).
`saap methods llm-pruner-param-first` has them.

Machine: v5e:2x4 (`saap plan llama-7b v5e:2x4`; docs/scale.md has the others). Neither was run here: no such model and
no such machine are at hand.
"""

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig

PLANNED = "llama-7b"
"""What `saap plan` calls a model of this size."""

CONFIG = CompareConfig(
    name="llm-pruner-llama-7b",
    model=ModelConfig(name="huggyllama/llama-7b", dtype="bfloat16"),
    calibration=CalibrationConfig(
        scenarios=("bookcorpus=jsonl:text/bookcorpus.jsonl#text",), examples=10, length=64, bos="never", batch_size=2
    ),
    methods=(
        "random",
        "llm-pruner-vectorize",
        "llm-pruner-param-first",
        "llm-pruner-param-second",
        "llm-pruner-param-mix",
    ),
    evaluation=EvaluationConfig(
        in_domain="ptb:ptb/valid.txt", out_of_domain="wikitext:wikitext2/test.txt", windows=0, length=128, bos="never"
    ),
    ratios=(0.203125, 0.5),
    mesh=MeshConfig(fsdp=2, tensor=4),
)
