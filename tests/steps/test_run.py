"""Running chains: rounds against a loop, what is shared is done once, what is kept is served only where nothing has
changed, and any combination of steps gives a keep-set that meets its ratio."""

import functools
import itertools
import os

import numpy as np
import pytest

from saap_jax.data.windows import Windows
from saap_jax.estimation.registry import code_of
from saap_jax.llama.segments import masks
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocation import choose, meets
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.allocation.rounds import stations
from saap_jax.steps.base import Store, TextSize
from saap_jax.steps.chain import expand, parse
from saap_jax.steps.limits import Within
from saap_jax.steps.run import Runner
from saap_jax.steps.score.calibrate import calibrate
from saap_jax.steps.score.score import Score
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.divergence import Divergence
from tests.helpers import forward, random_model, random_tokens, same, spec_of

TOKENS = random_tokens(8, 8)
TEXT = {"text": Windows(TOKENS, np.ones(TOKENS.shape, bool))}


class Counted(LlamaSubject):
    """A model that counts how often it is observed."""

    seen = 0

    def observe(self, *given, **options):
        type(self).seen += 1
        return super().observe(*given, **options)


@pytest.fixture
def subject():
    Counted.seen = 0
    return Counted(random_model(spec_of(*[(2, 8)] * 4)))


class Memory:
    """A cache in memory, which keeps copies."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, np.ndarray]] = {}

    def load(self, key):
        return self.held.get(key)

    def save(self, key, arrays) -> None:
        self.held[key] = {name: np.array(each) for name, each in arrays.items()}


def runner(subject, chains=(), *, key="", cache=None, batch_size=2, **options) -> Runner:
    return Runner(subject, TEXT, chains, Passes(batch_size), store=Store(cache, key), **options)


# --- rounds ----------------------------------------------------------------------------------------


def test_rounds_observe_again_and_what_is_gone_stays_gone(subject):
    keep, done = subject.existing, []
    for ratio in stations(0.45, 0.2):
        gone = {name: units & ~keep[name] for name, units in subject.existing.items()}
        scored = calibrate(subject, TEXT, {"wanda": Score("wanda")}, Passes(2), keep=keep)
        keep = choose(subject, scored.scores("wanda"), ratio, Uniform(), Within(), gone).keep
        done.append(keep)
    assert all(not (less[name] & ~more[name]).any() for more, less in itertools.pairwise(done) for name in keep)
    Counted.seen = 0
    rounds = runner(subject).run(parse("wanda > uniform > rounds(0.2)"), 0.45)
    assert same(rounds.keep, keep)
    assert Counted.seen == 3
    assert not same(runner(subject).run(parse("wanda > uniform"), 0.45).keep, keep), "control: in one step"


def test_rounds_repair_and_observe_the_repaired_model(subject):
    """Written out by two chains of one round; the text of the second is the first's outcome."""
    whole = runner(subject).run(parse("wanda > uniform > least_squares(damping=0.1) > rounds(0.2)"), 0.4)
    one = runner(subject).run(parse("wanda > uniform > least_squares(damping=0.1)"), 0.2)
    scored = calibrate(one.subject, TEXT, {"wanda": Score("wanda")}, Passes(2), keep=one.keep)
    keep = choose(subject, scored.scores("wanda"), 0.4, Uniform(), Within(), one.removed).keep
    assert same(whole.keep, keep)
    plain = runner(subject).run(parse("wanda > uniform > rounds(0.2) > least_squares(damping=0.1)"), 0.4)
    weights = [each.subject.model.segments[0].mlp.down[...] for each in (whole, plain)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-4, "control: repaired once"


def test_each_round_begins_with_the_limits_and_the_text_of_the_first(subject, monkeypatch):
    """What stands behind an allocation or a repair is not for it, in the second round neither."""
    plain = runner(subject).run(parse("wanda > uniform > rounds(0.2)"), 0.39)
    assert same(runner(subject).run(parse("wanda > uniform > within(multiple_of=4) > rounds(0.2)"), 0.39).keep,
                plain.keep)  # fmt: skip
    repaired, texts = LlamaSubject.repaired, []
    monkeypatch.setattr(LlamaSubject, "repaired", lambda self, keep, text, *given, **options: (
        texts.append(text), repaired(self, keep, text, *given, **options))[1])  # fmt: skip
    runner(subject).run(parse("wanda > uniform > bias > self_calibration(8, 2) > rounds(0.2)"), 0.39)
    assert len(texts) == 2
    assert all((text.tokens == TOKENS).all() for text in texts)


def test_whole_attentions_go_by_the_text_before_them_and_meet_the_ratio(subject, monkeypatch):
    losses, texts, judged = LlamaSubject.losses, [], []
    monkeypatch.setattr(LlamaSubject, "losses", lambda self, text, *given, **options: (
        texts.append(text), judged.append(self), losses(self, text, *given, **options))[2])  # fmt: skip
    early = "magnitude > within(max_ratio={attention: 0}) > uniform"
    made = runner(subject).run(parse(f"{early} > bias > attentions"), 0.5)
    assert {id(each) for each in judged} == {id(made.subject)} != {id(subject)}, "as it is repaired"
    texts.clear()
    made = runner(subject).run(parse(f"{early} > self_calibration(6, 2) > attentions"), 0.5)
    assert meets(subject, made.keep, 0.5)
    (written,) = made.text.values()
    assert texts
    assert all((text.tokens == written.tokens).all() for text in texts)
    with pytest.raises(ValueError, match="attentions: expected a chain before it that leaves attention alone, got one"):
        runner(subject).run(parse("magnitude > global > attentions"), 0.6)


def test_what_whole_attentions_leave_is_what_the_chain_before_them_is_checked_for(subject):
    chain = parse("magnitude > within(max_ratio={attention: 0}) > uniform > attentions")
    top = runner(subject).most_removable(chain)
    assert runner(subject).most_removable(parse(chain.name.rpartition(" >")[0])) < top < 1
    runner(subject).check(chain, [top])
    assert meets(subject, runner(subject).run(chain, top).keep, top)
    with pytest.raises(ValueError, match=f"the largest possible ratio is {top:.4f}"):
        runner(subject).check(chain, [top + 0.01])


HALF = "magnitude > within(max_ratio={attention: 0, mlp: 0.5}) > uniform > attentions"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "ratio", "attentions"),
    [
        (HALF, 0.35, 1),  # as the formula says
        (HALF, 0.5, 3),
        (HALF, 0.65, 5),
        (HALF.replace("0.5})", "0.5}, protect=(0,))"), 0.5, 4),
        (f"{HALF} > rounds(0.25)", 0.5, 3),
    ],
)
def test_more_attentions_go_where_the_rest_cannot(chain, ratio, attentions):
    """Two at 0.5 and three at 0.65, as the formula says, would be too few for what channels can give."""
    subject = LlamaSubject(random_model(spec_of(*[(2, 32)] * 5)))
    chain, run = parse(chain), runner(subject)
    run.check(chain, [ratio])
    keep = run.run(chain, ratio).keep
    gone = ~keep["attention"].any(axis=1)
    assert gone.sum() == attentions
    assert meets(subject, keep, ratio)
    channel = int(subject.costs["mlp"][0])
    assert subject.removed(keep) - ratio * subject.prunable < channel
    top = run.most_removable(chain)
    with pytest.raises(ValueError, match=f"the largest possible ratio is {top:.4f}"):
        run.check(chain, [top + 0.0002])
    run.check(chain, [top])
    assert meets(subject, run.run(chain, top).keep, top)


class Spent(LlamaSubject):
    """A model that counts forward passes over windows; those of the unpruned model's predictions do not count."""

    windows = 0

    def losses(self, examples, keeps, **options):
        self.windows += self.size(examples).rows * len(keeps)
        return super().losses(examples, keeps, **options)

    def objective(self, text, batch_size, *given, **options):
        found = super().objective(text, batch_size, *given, **options)
        value, judge = found.value, found.judge

        def valued(*asked):
            self.windows += batch_size
            return value(*asked)

        def judged(*asked):
            self.windows += batch_size * (self.size(text).rows // batch_size - found.parts)
            return judge(*asked)

        found.value, found.judge = valued, judged
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "ratio"),
    [
        ("magnitude > within(max_ratio={attention: 0}) > uniform > attentions", 0.5),
        ("magnitude > within(max_ratio={attention: 0}) > uniform > attentions(examples=2)", 0.9),
        ("magnitude > within(max_ratio={attention: 0}, protect=(0,)) > uniform > attentions", 0.6),
        (HALF, 0.6),
        ("magnitude > shape", 0.3),
        ("magnitude > shape(layers=0.5, finalists=2)", 0.5),
        ("magnitude > within(multiple_of={mlp: 4}) > uniform > shape(layers=0)", 0.3),
    ],
)
def test_passes_of_a_search_are_those_that_it_takes(chain, ratio):
    subject = Spent(random_model(spec_of(*[(2, 8)] * 4)))
    chain, run = parse(chain), runner(subject)
    expected = chain.passes(run.text_size, ratio, subject)
    assert expected > 0
    run.run(chain, ratio)
    assert subject.windows / len(TOKENS) == pytest.approx(expected)


def test_limits_behind_an_allocation_do_not_loosen_those_that_it_is_checked_for(subject):
    before = "magnitude > within(max_ratio=0.25) > uniform"
    chain, top = parse(f"{before} > within(max_ratio=0.9) > evolve"), runner(subject).most_removable(parse(before))
    assert runner(subject).most_removable(chain) == top < 0.5
    runner(subject).check(chain, [top])
    with pytest.raises(ValueError, match=f"the largest possible ratio is {top:.4f}"):
        runner(subject).check(chain, [0.5])


@pytest.mark.parametrize("chain", ["least_squares > layerwise", "bias > layerwise > rounds(0.2)"])
def test_no_unit_comes_back_whose_weights_a_repair_has_taken_out(subject, chain):
    made = runner(subject).run(parse(f"magnitude > uniform > {chain}"), 0.4)
    rows = np.asarray(made.subject.model.segments[0].mlp.down[...])
    assert (rows != 0).any(axis=2)[made.keep["mlp"]].all()


def test_a_round_that_a_large_block_has_made_needless_is_left_out(subject):
    made = runner(subject).run(parse("wanda > within(depth=True, min_keep=0) > global(by=score) > rounds(0.01)"), 0.3)
    assert meets(subject, made.keep, 0.3)
    assert Counted.seen < 8 < 30


def test_layers_are_repaired_in_rounds_as_the_repair_behind_them_says(subject):
    """Two chains that differ behind the rounds alone: the second is not served what the first did."""
    texts = [f"wanda > uniform > layerwise(wanda) > rounds(0.2) > {repair}"
             for repair in ("bias", "least_squares(damping=0.01)")]  # fmt: skip
    chains, together = expand(texts), runner(subject)
    for chain in chains:
        assert same(together.run(chain, 0.4).keep, runner(subject).run(chain, 0.4).keep)
    assert together.key_of(chains[0], 0.4) != together.key_of(chains[1], 0.4)


@pytest.mark.parametrize("step", ["learn", "evolve", "shape", "layerwise(wanda)", "scales"])
def test_too_little_text_to_hold_some_out_is_refused(subject, step):
    chain, name = parse(f"wanda > uniform > {step}"), step.partition("(")[0]
    with pytest.raises(ValueError, match=f"{name}: expected at least 4 microbatches of calibration text .* got 3"):
        chain.check(subject, TextSize(3, 1))
    chain.check(subject, TextSize(4, 1))
    parse("wanda > uniform > learn(0) > least_squares").check(subject, TextSize(3, 1))


# --- done once -------------------------------------------------------------------------------------


def test_one_pass_serves_all_chains(subject):
    chains = expand(["{wanda,fisher,wanda+magnitude} > {uniform,stable > global} > {none,bias}"])
    run = runner(subject, chains)
    for chain, ratio in itertools.product(chains, (0.2, 0.4)):
        run.run(chain, ratio)
    assert Counted.seen == 1 + len(TOKENS), "and one of each example, for `stable`"
    run.run(parse("gate_taylor > uniform"), 0.2)
    assert Counted.seen == 2 + len(TOKENS), "what nobody announced takes another pass"


def test_one_pass_serves_the_chains_of_a_choice_too(subject):
    chain = parse("best_of(gate_taylor > stable > global, magnitude)")
    runner(subject, [chain]).run(chain, 0.2)
    assert Counted.seen == 1 + len(TOKENS), "and one of each example, for `stable`"


@pytest.mark.parametrize(("repair", "then"), [("none", ""), ("bias", ", before about 3 passes over the text")])
def test_how_much_comes_behind_scoring_is_said(subject, repair, then):
    said, (chain,) = [], expand([f"wanda > uniform > {{{repair}}}"])
    track = lambda doing, items, total: said.append(doing) or iter(items)  # noqa: E731
    Runner(subject, TEXT, [chain], Passes(2, track=track), store=Store(None, "")).begin(chain, 0.2)
    assert said[0] == f"score all units{then}"


def test_a_chain_that_nobody_announced_may_ask_for_stability(subject):
    run = runner(subject, [parse("gate_taylor > uniform")])
    run.run(parse("gate_taylor > uniform"), 0.2)
    found = run.run(parse("gate_taylor > stable(3.0) > global"), 0.4)
    assert same(found.keep, runner(subject).run(parse("gate_taylor > stable(3.0) > global"), 0.4).keep)


def test_what_chains_begin_with_in_common_is_run_once(subject, monkeypatch):
    judged = []
    judge = Divergence.judge
    monkeypatch.setattr(Divergence, "judge", lambda self, keep: judged.append(1) or judge(self, keep))
    chains, run = expand(["wanda > uniform > learn(3, rate=0.3) > {none,bias,scales(2)}"]), runner(subject)
    for chain in chains:
        run.run(chain, 0.3)
    assert len(judged) == 2 + 2, "the start and one round of units, and of scales"


# --- the cache -------------------------------------------------------------------------------------

LONG = "FILE:mine > within(protect=(0,)) > uniform > rounds(0.2) > learn(3, rate=0.3)"
MINE = """
import dataclasses

from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.base import Estimator
from saap_jax.steps.allocation.allocations import Uniform
import helper


def mine() -> Estimator:
    def score(statistics, params):
        return {name: helper.size(abs(value)).mean(0) for name, value in statistics.of(GATE_GRADIENT).items()}

    return Estimator(needs=frozenset({GATE_GRADIENT}), score=score)


@dataclasses.dataclass(frozen=True)
class Own(Uniform):
    pass
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("def size(value):\n    return value\n")
    return tmp_path / "own.py"


def rewrite(file, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_how_fusions_came_about_is_served_too(subject):
    """Otherwise a run that goes on after a kill would say less of them than one that nobody killed."""
    chains, cache = expand(["fused(wanda, magnitude, method=learned) > uniform", "wanda+magnitude"]), Memory()

    def told(*asked):
        found = runner(subject, asked, key="a", cache=cache).first().fusions["text"]
        return {name: fused._replace(scores={}) for name, fused in found.items()}

    first, second = told(*chains), told(*chains)
    assert Counted.seen == 1
    assert len(first) == 2
    assert second == first
    assert list(told(chains[1])) == ["wanda+magnitude"], "no fusion that nobody asked for"


def test_a_second_runner_is_served(subject, file, monkeypatch):
    chain, cache = parse(LONG.replace("FILE", str(file))), Memory()
    first = runner(subject, [chain], key="a", cache=cache).run(chain, 0.4)
    seen, asked = Counted.seen, Divergence.gradient
    assert seen == 2
    monkeypatch.setattr(Divergence, "gradient", lambda *_: pytest.fail("trained again"))
    second = runner(subject, [chain], key="a", cache=cache).run(chain, 0.4)
    assert same(first.keep, second.keep)
    assert (second.metrics["divergences"], Counted.seen) == (first.metrics["divergences"], seen)
    monkeypatch.setattr(Divergence, "gradient", asked)
    other = parse(f"{chain.written.rpartition(' > ')[0]} > learn(3, rate=0.4) > bias")
    served = runner(subject, [other], key="a", cache=cache).run(other, 0.4)
    assert Counted.seen == seen, "scores of rounds are kept"
    plain = runner(subject, [other]).run(other, 0.4)
    assert same(served.keep, plain.keep), "with the limits that stand before the rounds"
    assert served.keep["mlp"][0].all()


INPUTS = {
    "weights or text": lambda made, file: made(key="b"),
    "ratio": lambda made, file: made(ratio=0.35),
    "size of microbatches": lambda made, file: made(batch_size=1),
    "option of a step": lambda made, file: made(("learn(3", "learn(4")),
    "option of a step before": lambda made, file: made(("rounds(0.2", "rounds(0.3")),
    "limits": lambda made, file: made(("protect=(0,)", "protect=(1,)")),
    "code of the estimator": lambda made, file: (rewrite(file, "abs(value)", "(value**2)"), made())[1],
    "code that the estimator imports": lambda made, file: (
        rewrite(file.with_name("helper.py"), "return value", "return value**3"),
        made(),
    )[1],
    "code of a step": lambda made, file: (rewrite(file, "    pass", "    pass  # other"), made())[1],
}


@pytest.mark.parametrize("changed", INPUTS)
def test_nothing_is_served_where_an_input_has_changed(subject, file, changed):
    cache = Memory()

    def made(change=("", ""), *, ratio: float = 0.4, key: str = "a", batch_size: int = 2) -> set[str]:
        """Return the keys that a run has added."""
        text = LONG.replace("FILE", str(file)).replace("> uniform", f"> {file}:Own").replace(*change)
        before = set(cache.held)
        run = runner(subject, key=key, cache=cache, batch_size=batch_size)
        keys.append(run.key_of(parse(text), ratio))
        run.run(parse(text), ratio)
        return set(cache.held) - before

    keys: list[str] = []
    assert made()
    assert not made(), "control: all is there"
    assert INPUTS[changed](made, file)
    assert keys[0] == keys[1] != keys[2]


def test_code_is_read_from_its_file_however_it_is_named(file, monkeypatch):
    """In quotes no shell expands a home; a factory may be wrapped."""
    monkeypatch.setenv("HOME", str(file.parent))
    rewrite(file, "def mine(", "import functools\n\n\n@functools.cache\ndef mine(")
    seen = []
    for _ in range(2):
        codes = {code_of(f"{each}:mine") for each in (file, f"~/{file.name}")} | {
            code_digest(object(), f"~/{file.name}")
        }
        assert len(codes) == 1
        seen += codes
        rewrite(file, "abs(value)", "(value**2)")
    assert "" != seen[0] != seen[1] != ""
    plain = code_digest(rewrite)
    assert {code_digest(each(rewrite)) for each in (functools.cache, functools.partial)} == {plain} != {""}


def test_the_share_at_the_end_counts_where_steps_look_ahead(subject):
    chain = parse("wanda > within(attention=0.5, attention_from=0.3) > uniform > rounds(0.2)")
    closed, opened = (runner(subject, open_end=end).key_of(chain, 0.4) for end in (False, True))
    assert closed != opened
    plain = parse("wanda > uniform > rounds(0.2)")
    assert len({runner(subject, open_end=end).key_of(plain, 0.4) for end in (False, True)}) == 1


@pytest.mark.parametrize("rule", ["momentum", "sigmoid"])
def test_training_goes_on_where_it_was_killed(subject, monkeypatch, rule):
    chain, cache, asked = parse(f"wanda > uniform > learn(9, rate=0.3, rule={rule})"), Memory(), []
    whole = runner(subject).run(chain, 0.4)
    gradient = Divergence.gradient

    def killed(self, gates, part):
        asked.append(part)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return gradient(self, gates, part)

    monkeypatch.setattr(Divergence, "gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        runner(subject, key="a", cache=cache).run(chain, 0.4)
    resumed = runner(subject, key="a", cache=cache).run(chain, 0.4)
    assert len(asked) == 5 + 6, "the round that was killed, and the one behind it"
    assert same(resumed.keep, whole.keep)
    assert resumed.metrics["divergences"] == whole.metrics["divergences"]
    assert len(set(whole.metrics["divergences"])) > 1, "control"
    runner(subject, key="a", cache=cache).run(chain, 0.4)
    assert len(asked) == 5 + 6, "what is done is not done again"


# --- any combination -------------------------------------------------------------------------------

ALLOCATIONS = ("uniform", "uniform(floor=True)", "log", "softmax(0.5)", "global", "stable > global",
               "uniform > rounds(0.2)")  # fmt: skip
REFINEMENTS = ("learn(3, rate=0.3)", "evolve(2, 4, (2, 1), (1, 1))", "layerwise(leverage)", "shape")
REPAIRS = ("bias", "least_squares", "least_squares(blend=1)", "scales(2)")


@pytest.fixture(scope="module")
def any_runner():
    return Runner(LlamaSubject(random_model(spec_of(*[(2, 8)] * 4))), TEXT, passes=Passes(2))


def holds(run: Runner, text: str, ratio: float = 0.3) -> None:
    """A chain meets its ratio, and the model that is cut computes what the masked one does."""
    done = run.run(parse(text), ratio)
    assert meets(run.subject, done.keep, ratio)
    assert not any((done.keep[name] & ~units).any() for name, units in run.subject.existing.items())
    masked = forward(done.subject.model, TOKENS, masks(done.keep))
    np.testing.assert_allclose(forward(done.subject.cut(done.keep).model, TOKENS), masked, rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("allocation", "refinement"), [
    (first, second) for first, second in itertools.product(ALLOCATIONS, REFINEMENTS)
    if "rounds" not in first or not second.startswith(("evolve", "shape"))])  # fmt: skip
def test_any_refinement_follows_any_allocation(any_runner, allocation, refinement):
    holds(any_runner, f"gate_fisher > {allocation} > {refinement}")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [*itertools.product((*REFINEMENTS, *REPAIRS), REPAIRS)])
def test_any_repair_follows_any_refinement_or_repair(any_runner, first, second):
    holds(any_runner, f"gate_fisher > uniform > {first} > {second}")
