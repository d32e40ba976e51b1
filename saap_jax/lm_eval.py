"""The command line of lm-evaluation-harness with the models of this library, `--model saap`; needs the extra `eval`.

    python -m saap_jax.lm_eval run --model saap --model_args path=smollm2-135m --tasks boolq --limit 100

The harness looks for no plug-ins, so that its own command `lm_eval` cannot know the model. Options of `--model_args`
are those of `saap_jax.evaluation.harness.HarnessModel`: path, dtype, max_length.
"""

import sys

from saap_jax.extras import missing


def main() -> None:
    """Register the model and run the harness's command."""
    if line := missing("eval", "lm-evaluation-harness"):
        sys.exit(f"saap: {line}")
    from lm_eval.__main__ import cli_evaluate

    import saap_jax.evaluation.harness  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    main()
