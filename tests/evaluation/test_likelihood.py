"""Log-likelihoods equal those of each request alone in a row; nothing runs twice; few programs compile."""

import itertools

import numpy as np
import pytest

from saap_jax.evaluation import likelihood
from saap_jax.evaluation.likelihood import Inputs, Request, log_likelihoods, pack, score_step
from saap_jax.llama import loss
from tests.helpers import VOCAB, dense_model, forward, ragged_model, random_model, spec_of


def alone(model, request: Request) -> tuple[float, bool]:
    """Score one request by the logits of its own sequence."""
    tokens = np.asarray([*request.context, *request.continuation])[-(model.constants.max_positions + 1) :]
    padded = np.zeros((1, 64), np.int32)  # on the right, so that one program is enough
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(forward(model, padded), np.float64)[0, : len(tokens) - 1][-len(request.continuation) :]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = logs[np.arange(len(logs)), request.continuation]
    return picked.sum(), bool((logits.argmax(axis=1) == request.continuation).all())


def draw(random, length: int) -> tuple[int, ...]:
    return tuple(random.integers(0, VOCAB, length).tolist())


def mixture(seed: int = 0) -> list[Request]:
    """Return items with choices, one-token choices, contexts that begin alike, repeats, and single requests."""
    random = np.random.default_rng(seed)
    requests = []
    for length in (1, 5, 9, 20, 40):
        context = draw(random, length)
        requests += [Request(context, draw(random, size)) for size in (1, 1, 1, 2, 6)]
        beginning = draw(random, length)
        continuation = draw(random, 3)
        requests += [Request((*beginning, *draw(random, 2)), continuation) for _ in range(2)]
    requests += [Request((7, 3, 5), (token,)) for token in range(VOCAB)]  # one of these is the likeliest
    requests += [requests[0], Request(requests[0].context, requests[3].continuation[:1])]
    return [requests[number] for number in random.permutation(len(requests))]


MODELS = {
    "tied": lambda: dense_model(tied=True),
    "untied": lambda: dense_model("mha"),
    "biases": lambda: dense_model("mqa", output_biases=True),
    "ragged": ragged_model,
    "no heads": lambda: random_model(spec_of((0, 4), (2, 0), (0, 0))),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch_size"), [*((name, 4) for name in MODELS), ("ragged", 1)])
def test_as_each_request_alone(name, batch_size, monkeypatch):
    monkeypatch.setattr(loss, "VOCAB_CHUNK", 7)  # several chunks, the last one overlaps
    score_step.clear_cache()
    model, requests = MODELS[name](), mixture()
    found = log_likelihoods(model, requests, batch_size=batch_size)
    expected = [alone(model, request) for request in requests]
    np.testing.assert_allclose([row[0] for row in found], [row[0] for row in expected], rtol=0, atol=2e-5)
    assert [row[1] for row in found] == [row[1] for row in expected]
    assert any(row[1] for row in expected)
    assert not all(row[1] for row in expected)
    score_step.clear_cache()


def test_a_continuation_counts_whole_and_in_order():
    """Negative control: swapped tokens, or another context, have another likelihood."""
    model = dense_model()
    first, swapped, other = log_likelihoods(
        model, [Request((1, 2, 3), (4, 5)), Request((1, 2, 3), (5, 4)), Request((1, 3, 2), (4, 5))]
    )
    assert len({round(each.log_likelihood, 4) for each in (first, swapped, other)}) == 3


@pytest.mark.slow
def test_what_is_greedy():
    """A continuation that greedy decoding makes is greedy, one with another last token is not."""
    model, tokens = dense_model(), [3, 1, 2]
    for _ in range(4):
        tokens.append(int(forward(model, np.asarray([tokens]))[0, -1].argmax()))
    good = Request(tuple(tokens[:3]), tuple(tokens[3:]))
    bad = Request(good.context, (*good.continuation[:-1], (good.continuation[-1] + 1) % VOCAB))
    assert [each.greedy for each in log_likelihoods(model, [good, bad])] == [True, False]


def test_long_requests_lose_tokens_on_the_left():
    from saap_jax.llama import Constants

    model = random_model(spec_of((2, 6), (2, 6), constants=Constants(max_positions=8)))
    random = np.random.default_rng(0)
    requests = [Request(draw(random, 12), draw(random, 3)), Request(draw(random, 2), draw(random, 8))]
    found = log_likelihoods(model, requests)
    for each, request in zip(found, requests, strict=True):
        assert each.log_likelihood == pytest.approx(alone(model, request)[0], abs=1e-5)
    short = Request(requests[0].context[-6:], requests[0].continuation)
    assert log_likelihoods(model, [short])[0].log_likelihood == pytest.approx(found[0].log_likelihood, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (1,)), "request 1: expected a context, .* got 0 and 1 tokens"),
        (Request((1,), ()), "got 1 and 0 tokens"),
        (Request((1,), (1,) * 3000), "a continuation of 1 to 2048 tokens .* got 1 and 3000"),
    ],
)
def test_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(dense_model(), [Request((1,), (1,)), request_])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        log_likelihoods(dense_model(), [Request((1,), (1,))], batch_size=0)


class TestWhatRuns:
    def test_choices_of_an_item_share_the_context(self):
        random = np.random.default_rng(0)
        items = [draw(random, 50) for _ in range(6)]
        requests = [Request(context, draw(random, 9)) for context in items for _ in range(4)]
        rows = pack(likelihood.distinct_inputs(requests, 2048))
        assert [(row.shared, row.length) for row in rows] == [(50, 50 + 4 * 8)] * 6, "the last token does not run"

    def test_packing_is_the_cheapest(self):
        """Against every way to cut the sorted sequences into rows."""
        random = np.random.default_rng(0)
        for _ in range(30):
            prefixes = [tuple(random.integers(0, 2, 6).tolist()) for _ in range(2)]
            tokens = sorted({(*prefixes[random.integers(2)], *random.integers(0, 3, 4).tolist()) for _ in range(7)})
            inputs = [Inputs(each, (number,), 1) for number, each in enumerate(tokens)]
            costs = []
            for cuts in itertools.product([False, True], repeat=len(inputs) - 1):
                bounds = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), len(inputs)]
                costs.append(sum(cost_of(tokens[a:b]) for a, b in itertools.pairwise(bounds)))
            assert sum(likelihood.row_cost(row.length) for row in pack(inputs)) == pytest.approx(min(costs))
            assert min(costs) < max(costs)

    def test_rows_stay_short(self):
        requests = [Request(tuple(range(20)), (n % VOCAB, n // VOCAB, 1, 2, 3, 4, 5, 6)) for n in range(200)]
        rows = pack(likelihood.distinct_inputs(requests, 2048))
        assert max(row.length for row in rows) <= likelihood.ROW_LIMIT
        assert max(row.targets for row in rows) <= likelihood.ROW_LIMIT
        assert len(rows) > 1

    def test_many_choices_of_one_context(self):
        """More targets than a row has room for are shared out."""
        requests = [Request((1, 2), (n % VOCAB,)) for n in range(3 * likelihood.ROW_LIMIT)]
        found = log_likelihoods(dense_model(), requests)
        assert len({round(each.log_likelihood, 5) for each in found}) == VOCAB

    @pytest.mark.slow
    def test_programs(self):
        """200 requests of all lengths compile one program a padded length; again, or fewer of them: none."""
        model, random = dense_model(), np.random.default_rng(0)
        requests = [Request(draw(random, int(size)), draw(random, 3)) for size in random.integers(1, 55, 200)]
        batches = likelihood.cheapest_batches(pack(likelihood.distinct_inputs(requests, 2048)), 16)
        assert len({batch.length for batch in batches}) < len({len(request.context) for request in requests}) / 4
        score_step.clear_cache()
        log_likelihoods(model, requests)
        programs = score_step._cache_size()
        assert programs == len({batch.length for batch in batches}) > 1
        log_likelihoods(model, requests[:100] + requests)
        assert score_step._cache_size() == programs
        log_likelihoods(model, [Request(draw(random, 600), (1,))])
        assert score_step._cache_size() == programs + 1, "a longer one"

    def test_little_is_padded(self):
        random = np.random.default_rng(0)
        requests = [Request(draw(random, int(size)), draw(random, 3)) for size in random.integers(40, 300, 400)]
        rows = pack(likelihood.distinct_inputs(requests, 2048))
        batches = likelihood.batches_of(rows, 16, 4)
        assert sum(len(batch.rows) for batch in batches) == len(rows)
        padded = sum(batch.length * batch.size for batch in batches)
        assert padded < 1.2 * sum(row.length for row in rows)

    def test_more_rows_or_fewer_runs_pay_for_more_programs(self):
        random = np.random.default_rng(0)
        requests = [Request(draw(random, int(size)), draw(random, 3)) for size in random.integers(40, 300, 4000)]
        rows = pack(likelihood.distinct_inputs(requests, 2048))

        def programs(rows, runs):
            return len({batch.length for batch in likelihood.cheapest_batches(rows, 16, runs)})

        assert programs(rows[::200], 1) < programs(rows, 1)
        assert programs(rows, 100) < programs(rows, 1)


def cost_of(tokens: list[tuple[int, ...]]) -> float:
    shared = len(tokens[0])
    for other in tokens[1:]:
        shared = min(shared, likelihood.common_length(tokens[0], other))
    return likelihood.row_cost(shared + sum(len(each) - shared for each in tokens))
