"""Fine-tune SmolLM2-135M without a fifth of its prunable parameters, on text that comes with the package.

    saap prune --ratio 0.2 --method "fused > within(multiple_of={mlp: 32}) > uniform > least_squares"
    saap recover recover

Quantises the pruned model to 4 bits and trains group-wise adapters on the calibration part of the Python language
reference, which merge into the quantised model; prints before and after beside the dense model. Another model than
models/pruned is named first: `saap recover MODEL recover`. Plain adapters, and all parameters:

    saap recover recover --name lora --method.name lora
    saap recover recover --name full --method.name full --training.learning-rate 2e-5

On instruction data, which comes from a file, the responses are learned:

    saap recover recover --name instruct --data.sources instruct:alpaca.jsonl
"""

from saap_jax.config.recover import RecoverConfig, TrainingConfig

CONFIG = RecoverConfig(
    name="recover",
    training=TrainingConfig(batch_size=16, microbatch=4, learning_rate=5e-4, warmup=4, check_every=10),
)
