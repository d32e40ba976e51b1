"""The choice between chains: by plain divergence on what no chain was fitted on, and then the chain itself."""

import numpy as np
import pytest

from saap_jax.data.windows import Windows
from saap_jax.runtime.progress import Passes
from saap_jax.steps.base import Store
from saap_jax.steps.best_of import EVERY
from saap_jax.steps.chain import expand, parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import LlamaSubject
from tests.divergence import plain_divergence
from tests.helpers import dense_model, random_tokens, same
from tests.steps.test_run import Memory

TOKENS = random_tokens(20, 8, 3)
TEXT = {"text": Windows(TOKENS, np.ones(TOKENS.shape, bool))}
HELD = np.arange(len(TOKENS)) % EVERY == EVERY - 1
CHAINS = ["magnitude > uniform", "magnitude > uniform > least_squares(damping=0.1)", "magnitude > global"]


class Counted(LlamaSubject):
    """A model that counts how often it is observed and repaired."""

    repairs = seen = 0

    def observe(self, *given, **options):
        type(self).seen += 1
        return super().observe(*given, **options)

    def repaired(self, *given, **options):
        type(self).repairs += 1
        return super().repaired(*given, **options)


def runner(subject, text=TEXT, cache=None) -> Runner:
    return Runner(subject, text, (), Passes(4), store=Store(cache, "key"))


def judged(subject, chain, text=TEXT) -> float:
    """The divergence of a chain that was run without the held-out windows, on them, by numpy."""
    fit = {"text": Windows(TOKENS, np.broadcast_to(~HELD[:, None], TOKENS.shape))}
    state = runner(subject).fitted_on(fit).run(parse(chain), 0.5)
    gates = {name: units.astype(np.float64) for name, units in state.keep.items()}
    return plain_divergence(state.subject.model, subject.model, gates, [(TOKENS[HELD], np.ones((4, 8), bool))])


def test_the_lowest_divergence_on_text_that_was_held_out_wins_and_its_chain_runs_on_all_of_the_text(x64):
    subject = LlamaSubject(dense_model(dtype=np.float64))
    expected = [judged(subject, each) for each in CHAINS]
    assert len(set(expected)) == 3, "control"
    for order in ([0, 1, 2], [2, 1, 0]):
        chains = [CHAINS[at] for at in order]
        state = runner(subject).run(parse(f"best_of({', '.join(chains)})"), 0.5)
        assert state.metrics["judged"] == pytest.approx([expected[at] for at in order], rel=1e-6)
        assert state.metrics["chosen"] == CHAINS[int(np.argmin(expected))]
    winner = runner(subject).run(parse(state.metrics["chosen"]), 0.5)
    assert same(state.subject.model, winner.subject.model)
    assert same(dict(state.keep), dict(winner.keep))
    loser = runner(subject).run(parse(CHAINS[int(np.argmax(expected))]), 0.5)
    assert not same((state.subject.model, dict(state.keep)), (loser.subject.model, dict(loser.keep))), "control"


def test_what_was_judged_before_a_kill_is_not_judged_again():
    subject, cache, chain = Counted(dense_model()), Memory(), parse(f"best_of({', '.join(CHAINS)})")
    Counted.repairs = Counted.seen = 0
    first = runner(subject, cache=cache).run(chain, 0.5)
    assert Counted.seen == 1, "one pass scores for all"
    assert Counted.repairs == 1 + (first.metrics["chosen"] == CHAINS[1])
    kept = next(each for each in cache.held.values() if "judged" in each)
    kept["judged"] = kept["judged"][:2]  # killed while the third was tried
    Counted.repairs = 0
    again = runner(subject, cache=cache).run(chain, 0.5)
    assert again.metrics["judged"] == first.metrics["judged"]
    assert Counted.repairs == (first.metrics["chosen"] == CHAINS[1])
    kept["judged"] = np.array([np.nan, 1e-9, 1.0])
    assert runner(subject, cache=cache).run(chain, 0.5).metrics["chosen"] == CHAINS[1], "control: by what was kept"


def test_steps_behind_go_on_from_the_winner_and_know_what_chains_ask_for():
    chain = parse(f"best_of({CHAINS[0]}, wanda > within(protect=(0,)) > global) > scales(2)")
    assert [score.written for score in chain.scores] == ["magnitude", "wanda"]
    assert chain.repairs
    assert not parse(f"best_of({CHAINS[0]}, wanda)").repairs
    assert parse(f"best_of({', '.join(CHAINS)})").repairs, "of a chain within"
    assert parse(chain.written).written == chain.written
    state = runner(LlamaSubject(dense_model())).run(chain, 0.2)
    assert {"judged", "scaled"} <= state.metrics.keys()
    assert len(expand(["best_of(wanda, magnitude) > {none,scales(2)}"])) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best_of(wanda)", "expected two chains or more, each once, got wanda"),
        ("best_of()", "got none"),
        ("best_of(wanda, wand)", "did you mean 'wanda'"),
        ("magnitude > best_of(wanda, magnitude)", "expected best_of first, got it behind magnitude"),
        ("best_of(wanda, magnitude) > rounds(0.1)", "expected score before rounds, got best_of"),
        ("best_of(wanda > uniform > rounds, magnitude) > shape", "expected no rounds beside shape"),
    ],
)
def test_what_is_no_choice_is_refused(text, said):
    with pytest.raises(ValueError, match="(?s).*".join(said.split("  "))):
        parse(text)


def test_a_ratio_that_one_chain_cannot_meet_is_refused_before_any_time_is_spent():
    chain = parse("best_of(magnitude, magnitude > within(max_ratio=0.5))")
    with pytest.raises(ValueError, match="cannot be removed"):
        runner(LlamaSubject(dense_model())).check(chain, [0.6])
    runner(LlamaSubject(dense_model())).check(chain, [0.2])


def test_what_chooses_behind_repaired_layers_does_so_without_the_repairs_at_the_end_too():
    subject = LlamaSubject(dense_model(layers=4, mlp=12))
    chain = "wanda > within(max_ratio={attention: 0}) > uniform > layerwise(obs) > least_squares"
    state = runner(subject).run(parse(f"best_of({chain}, random > global) > bias"), 0.3)
    assert state.metrics["chosen"] == chain
    assert same(dict(state.keep), dict(runner(subject).choose(parse(chain), 0.3).keep))
    plain = runner(subject).run(parse(chain.rpartition(" > ")[0]), 0.3)
    assert not same(dict(state.keep), dict(plain.keep)), "control: on layers that are not repaired"


@pytest.mark.parametrize(("windows", "batch_size"), [(4, 1), (5, 1), (10, 3)])
def test_some_text_is_left_to_steps_that_judge(windows, batch_size):
    """Of four microbatches learning holds out the last, in which there is a single window; of five the fourth."""
    text = {"text": Windows(TOKENS[:windows], np.ones((windows, 8), bool))}
    one = Runner(LlamaSubject(dense_model()), text, (), Passes(batch_size), store=Store(Memory(), "key"))
    told = one.run(parse("best_of(wanda > uniform > learn(3), magnitude > uniform)"), 0.4).metrics
    assert min(told["judged"]) > 0
    held = [each["judged"] for each in one.cache.held.values() if "judged" in each]
    assert len(held) >= 2, "of the choice, and of learning in it"
    assert all((each > 0).all() for each in held), "of some tokens"


def test_windows_count_by_their_tokens(x64):
    subject, mask = LlamaSubject(dense_model(dtype=np.float64)), np.ones(TOKENS.shape, bool)
    mask[4, 2:] = mask[9, 5:] = False
    chains, text = expand([CHAINS[0], CHAINS[2]]), {"text": Windows(TOKENS, mask)}
    told = runner(subject, text).run(parse(f"best_of({CHAINS[0]}, {CHAINS[2]})"), 0.5).metrics["judged"]
    for each, found in zip(chains, told, strict=True):
        gates = {name: units.astype(np.float64) for name, units in runner(subject, text).run(each, 0.5).keep.items()}
        expected = plain_divergence(subject.model, subject.model, gates, [(TOKENS[HELD], mask[HELD])])
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_choice_within_a_choice_is_judged_on_what_the_outer_one_left(monkeypatch):
    subject, judges = LlamaSubject(dense_model()), []
    found = LlamaSubject.divergences
    monkeypatch.setattr(LlamaSubject, "divergences", lambda self, text, *given, **options: (
        judges.append(text.tokens), found(self, text, *given, **options))[1])  # fmt: skip
    runner(subject).run(parse(f"best_of(best_of({CHAINS[0]}, random), {CHAINS[2]})"), 0.5)
    left = TOKENS[~HELD][np.arange(16) % EVERY == EVERY - 1]
    assert all((tokens == left).all() for tokens in judges[:2])
    assert (judges[2] == TOKENS[HELD]).all()


def test_of_few_windows_the_last_one_judges_and_one_window_is_refused(x64):
    subject, chain, told = LlamaSubject(dense_model(dtype=np.float64)), parse(f"best_of({', '.join(CHAINS)})"), []
    for last in TOKENS[3:5]:
        few = Windows(np.stack([*TOKENS[:3], last]), np.ones((4, 8), bool))
        told.append(runner(subject, {"text": few}).run(chain, 0.5).metrics["judged"])
    state = runner(subject).run(parse(CHAINS[0]), 0.5)
    gates = {name: units.astype(np.float64) for name, units in state.keep.items()}
    expected = plain_divergence(subject.model, subject.model, gates, [(TOKENS[3:4], np.ones((1, 8), bool))])
    assert told[0][0] == pytest.approx(expected, rel=1e-6)
    assert told[1][0] != pytest.approx(expected, rel=1e-6), "control"
    one = {"text": Windows(TOKENS[:1], np.ones((1, 8), bool))}
    for batch_size in (1, 4):
        with pytest.raises(ValueError, match="expected two windows"):
            Runner(subject, one, (), Passes(batch_size)).run(chain, 0.4)
