"""What training brings while weights stay: which units, then least squares, then a factor a unit; on three seeds.

    saap compare learned

The units that docs/studies.md compares and those that are learnt from them, towards what the unpruned model predicts,
each as they are, with one factor a unit, with least squares, and with both; all on the same 128 windows of C4.
Evaluated on the first 64 windows of WikiText-2 and of Penn Treebank (`SAAP_DATA` says where they are). By counting,
not run, it takes four hours on two cores; it goes on where it was stopped, and units that were learnt serve all that
is done behind them.
"""

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig

UNITS = "fused > within(protect=(0.13, -0.07), attention=0.1) > uniform > rounds(0.1)"

CONFIG = CompareConfig(
    name="learned",
    calibration=CalibrationConfig(scenarios=("c4=jsonl:text/c4_en_300docs.jsonl#text",), examples=128),
    methods=(f"{UNITS} > {{none,learn(72)}} > {{none,scales(48),least_squares,least_squares > scales(48)}}",),
    seeds=(0, 1, 2),
    evaluation=EvaluationConfig(in_domain="ptb:ptb/valid.txt", out_of_domain="wikitext:wikitext2/test.txt", windows=64),
    ratios=(0.2, 0.5),
)
