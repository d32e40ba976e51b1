"""Text that the unpruned model writes: as it predicts, and who goes by it."""

from typing import ClassVar

import numpy as np
import pytest

from saap_jax.data.windows import Windows
from saap_jax.runtime.progress import Passes
from saap_jax.steps.base import Context, TextSize
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject, subject_of
from tests.helpers import dense_model, forward, random_tokens, same
from tests.trace.subject.problems import stacked

TOKENS = random_tokens(6, 10, 3)
TEXT = {"text": Windows(TOKENS, np.ones(TOKENS.shape, bool))}
MANY = "self_calibration(12, 3)"


class Written(LlamaSubject):
    """A model that keeps what it was asked to write."""

    texts: ClassVar[list[Windows]] = []

    def continued(self, *given, **options):
        self.texts.append(super().continued(*given, **options))
        return self.texts[-1]


def run(chain, subject, text=TEXT, ratio=0.3):
    return Runner(subject, text, (), Passes(2)).run(parse(chain), ratio)


def test_a_cold_draw_is_what_the_model_finds_likeliest_after_each_prompt_in_turn():
    subject, mask = LlamaSubject(dense_model()), np.ones(TOKENS.shape, bool)
    mask[1] = False  # held out: nothing begins as it does
    mask[4, 7:] = False
    found = subject.continued(Windows(TOKENS, mask), 7, 3, temperature=1e-6, seed=0)
    expected = TOKENS[[0, 2, 3, 5, 0, 2, 3], :3].tolist()
    for row in expected:
        while len(row) < 10:
            row.append(int(np.argmax(forward(subject.model, np.array([row]))[0, -1])))
    assert found.tokens.tolist() == expected
    assert found.mask.all()


def test_draws_follow_the_probabilities_and_the_seed_behind_half_a_window_at_most():
    subject = LlamaSubject(dense_model())

    def draw(seed, rows=4000):
        return subject.continued(TEXT["text"], rows, 9, temperature=1.0, seed=seed).tokens[:, 5]

    logits = np.asarray(forward(subject.model, TOKENS[:, :5])[:, -1], np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    tokens = draw(0)
    for at, probabilities in enumerate(expected):
        counts = np.bincount(tokens[at :: len(TOKENS)], minlength=probabilities.size)
        error = np.sqrt(probabilities * (1 - probabilities) / counts.sum())
        assert np.all(np.abs(counts / counts.sum() - probabilities) < 5 * error)
    assert np.abs(np.bincount(tokens[1 :: len(TOKENS)], minlength=logits.shape[1]) / 667 - expected[0]).max() > 0.05
    assert same(draw(0, 20), draw(0, 20))
    assert not same(draw(0, 20), draw(1, 20)), "control"


@pytest.mark.slow
def test_self_calibration_of_float64(x64):
    single, double = (LlamaSubject(dense_model(mlp=8, dtype=dtype)) for dtype in (np.float32, np.float64))
    cold = "wanda > uniform > self_calibration(12, 3, temperature=0.000001) > least_squares"
    texts = [run(cold, subject).text["self_calibration"].tokens for subject in (single, double)]
    assert same(*texts)
    model = run(cold, double).subject.model
    assert model.segments[0].mlp.down[...].dtype == np.float64
    warm = run(cold.replace("0.000001", "1.0"), double).text["self_calibration"].tokens
    assert not same(warm, texts[0]), "control"


def test_steps_behind_go_by_what_was_written_and_scores_do_not():
    subject = LlamaSubject(dense_model(mlp=8))
    written = subject.continued(TEXT["text"], 12, 3, temperature=1.0, seed=0)
    state = run(f"wanda > uniform > {MANY} > least_squares", subject)
    plain = run("wanda > uniform", subject)
    assert same(dict(state.keep), dict(plain.keep))
    repair = parse("wanda > uniform > least_squares").steps[-1]
    for text, beside in (({"own": written}, False), ({**TEXT, "own": written}, True)):
        on = Context(dense=subject, scenarios=text, ratio=0.3, final=0.3, batch_size=2)
        expected = repair(plain, on).subject.model
        found = run(f"wanda > uniform > self_calibration(12, 3, beside={beside}) > least_squares", subject)
        assert same(found.subject.model, expected)
    of_text = run("wanda > uniform > least_squares", subject)
    assert not same(of_text.subject.model, state.subject.model), "control"
    again = run(f"wanda > uniform > {MANY} > bias > self_calibration(12, 3, seed=1) > least_squares", subject)
    assert [*again.text] == ["self_calibration"]


@pytest.mark.slow
def test_options_reach_the_writer():
    subject = LlamaSubject(dense_model(mlp=8))
    options = {"temperature": 0.5, "seed": 2}
    found = run("wanda > uniform > self_calibration(12, 3, temperature=0.5, seed=2) > bias", subject).text
    assert same(found["self_calibration"], subject.continued(TEXT["text"], 12, 3, **options))
    for other in ({"temperature": 1.0}, {"seed": 0}):
        wrong = subject.continued(TEXT["text"], 12, 3, **options | other)
        assert not same(found["self_calibration"], wrong), "control"


def test_a_repair_that_is_done_is_done_again_on_what_was_written():
    subject = LlamaSubject(dense_model(layers=3, mlp=8))
    text = {"text": Windows(*(np.concatenate([each, each]) for each in TEXT["text"]))}
    before, found, done = (run(f"wanda > uniform > layerwise{behind}", subject, text)
                           for behind in ("", f" > {MANY} > least_squares", " > least_squares"))  # fmt: skip
    assert same(dict(found.keep), dict(done.keep))
    on = Context(dense=subject, scenarios=found.text, ratio=0.3, final=0.3, batch_size=2)
    repair, start = parse("wanda > uniform > least_squares").steps[-1], before._replace(keep=found.keep)
    assert same(repair(start, on).subject.model, found.subject.model)
    assert not same(done.subject.model, found.subject.model), "control"


def test_a_text_is_written_once_for_all_ratios_and_by_the_unpruned_model():
    subject = Written(dense_model(mlp=8))
    runner, chain = Runner(subject, TEXT, (), Passes(2)), parse(f"wanda > uniform > least_squares > {MANY} > bias")
    for ratio in (0.2, 0.4):
        runner.run(chain, ratio)
    (written,) = subject.texts
    assert same(written, LlamaSubject(subject.model).continued(TEXT["text"], 12, 3, temperature=1.0, seed=0))


def test_steps_that_need_more_text_than_there_is_get_it():
    subject, few = LlamaSubject(dense_model()), {"text": Windows(*(each[:2] for each in TEXT["text"]))}
    with pytest.raises(ValueError, match="scales: expected at least 4 microbatches"):
        Runner(subject, few, (), Passes(2)).check(parse("wanda > uniform > scales(2)"), [0.2])
    chain = parse(f"wanda > uniform > {MANY} > scales(2)")
    Runner(subject, few, (), Passes(2)).check(chain, [0.2])
    assert len(run(chain.written, subject, few).metrics["scaled"]) == 2


def test_a_choice_between_chains_leaves_a_repair_behind_it_to_what_was_written():
    subject = LlamaSubject(dense_model(mlp=8))
    chains = "wanda > uniform > bias, magnitude > uniform > bias"
    found = run(f"best_of({chains}) > {MANY} > least_squares", subject)
    choice = found.metrics["chosen"].partition(" > ")[0]
    expected = run(f"{choice} > uniform > {MANY} > least_squares", subject)
    assert same(found.subject.model, expected.subject.model)
    twice = run(f"{found.metrics['chosen']} > {MANY} > least_squares", subject)
    assert not same(found.subject.model, twice.subject.model), "control"
    kept = Runner(subject, TEXT, (), Passes(1)).run(parse(f"best_of({chains}) > scales(1)"), 0.3)
    assert kept.metrics.keys() > {"corrections"}, "nothing in closed form behind it: the winner keeps its own"


def test_who_writes_no_text_and_what_is_no_beginning_are_refused():
    with pytest.raises(ValueError, match="self_calibration: is for attention and MLP of layers"):
        parse(f"wanda > uniform > {MANY} > bias").check(subject_of(stacked()), TextSize(5, 1))
    padded = {"text": Windows(TOKENS, np.arange(10) < np.full((6, 1), 9))}
    with pytest.raises(ValueError, match="expected whole windows of two tokens or more to go on from, got none"):
        run(f"wanda > uniform > {MANY} > bias", LlamaSubject(dense_model()), padded)
