"""Text for nothing: what the unpruned model writes is as much text as anybody asks for, and costs no data."""

import dataclasses
from typing import Annotated

from saap_jax.checks import Natural, Positive, check_positive
from saap_jax.steps.base import Context, Cost, Prefix, State, Step, TextSize, step
from saap_jax.subjects.base import LanguageModel, joined, language_model

PASSES = 4.0
"""Forward passes over a text that it takes about as long to write."""


@step("self_calibration")
@dataclasses.dataclass(frozen=True)
class SelfCalibration(Step):
    """Let the unpruned model write the text that the steps behind go by, in place of the calibration text.

    A repair that fits thousands of weights to 32 windows fits these windows, and what is trained or judged behind it
    on the same ones sees a model that is better than it is. So give each of them text of its own, with another seed.
    Each window begins as a calibration window does, in turn. Scores come from the calibration text all the same.
    Sources: Self-calibration for language model quantization and pruning (arXiv:2410.17170); Beware of calibration
    data for pruning large language models (arXiv:2410.17711).
    """

    kind = "text"
    of = LanguageModel

    windows: Positive = 96
    """How many, each as long as those of the calibration text."""
    prompt: Positive = 12
    """Tokens of a calibration window that a window begins with, at most half of it."""
    temperature: Annotated[float, check_positive] = 1.0
    """Divides the logits; 1 draws as the model predicts."""
    seed: Natural = 0
    """Seed of the draws."""
    beside: bool = False
    """Whether the calibration text stays, in front of what is written."""

    def plan(self, text: TextSize, ratio: float, prefix: Prefix) -> Cost:
        """The passes that take as long as the writing."""
        return Cost(PASSES * self.windows / text.windows)

    def text_size(self, text: TextSize, calibration: TextSize) -> TextSize:
        """What it writes, and perhaps the calibration text."""
        return calibration._replace(windows=self.windows + self.beside * calibration.windows)

    def __call__(self, state: State, on: Context) -> State:
        """Write the text, as one scenario."""
        memory = on.chain(self).memory  # the text is the same at each ratio
        if self.written not in memory:
            given = joined([*on.scenarios.values()])
            memory[self.written] = language_model(self.name, on.dense).continued(
                given, self.windows, self.prompt, temperature=self.temperature, seed=self.seed
            )
        text = dict(on.scenarios) if self.beside else {}
        text[self.name] = memory[self.written]
        return state._replace(text=text, precomputed=None)  # a repair that is done is not of this text
