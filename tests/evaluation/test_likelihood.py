"""Log-likelihoods equal those of each request alone in a row; same inputs run once; few programs compile."""

import numpy as np
import pytest

from saap_jax.evaluation.likelihood import Request, batches_of, distinct_inputs, log_likelihoods, score_step
from saap_jax.llama import loss
from tests.helpers import VOCAB, dense_model, forward, ragged_model, random_model, spec_of


def alone(model, request: Request) -> tuple[float, bool]:
    """Score one request by the logits of its own sequence."""
    tokens = np.asarray([*request.context, *request.continuation])[-(model.constants.max_positions + 1) :]
    padded = np.zeros((1, 96), np.int32)  # on the right, so that one program is enough
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


def test_long_requests_lose_tokens_on_the_left():
    from saap_jax.llama.spec import Constants

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


def test_many_choices_of_one_context():
    """More targets than a batch has tokens are scored by one row."""
    requests = [Request((1, 2), (n % VOCAB,)) for n in range(1536)]
    assert [len(batch.rows) for batch in batches_of(distinct_inputs(requests, 2048), 4)] == [1]
    found = log_likelihoods(dense_model(), requests, batch_size=4)
    assert len({round(each.log_likelihood, 5) for each in found}) == VOCAB


@pytest.mark.slow
def test_programs():
    """200 requests of all lengths compile one program a padded length; again, or fewer of them: none."""
    model, random = dense_model(), np.random.default_rng(0)
    requests = [Request(draw(random, int(size)), draw(random, 3)) for size in random.integers(1, 55, 200)]
    batches = batches_of(distinct_inputs(requests, 2048), 16)
    assert len({batch.length for batch in batches}) < len({len(request.context) for request in requests}) / 4
    score_step.clear_cache()
    log_likelihoods(model, requests)
    programs = score_step._cache_size()
    assert programs == len({batch.length for batch in batches}) > 1
    log_likelihoods(model, requests[:100] + requests)
    assert score_step._cache_size() == programs
    log_likelihoods(model, [Request(draw(random, 600), (1,))])
    assert score_step._cache_size() == programs + 1, "a longer one"
