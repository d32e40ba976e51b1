"""Fusion: the closed form by hand and as a minimum, gradient steps against it, variances over examples, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.steps.score.fusion import fuse

SCOPES = ("global", "structure", "layer")


def two(seed: int = 0, scales: tuple[float, float] = (1.0, 1.0)) -> dict:
    """Heavy-tailed scores of two estimators; the last layer has fewer channels."""
    rng = np.random.default_rng(seed)
    scores = {}
    for name, scale in zip(("vector", "element"), scales, strict=True):
        mlp = rng.lognormal(0, 2, (3, 40)) * scale
        mlp[2, 30:] = np.nan
        scores[name] = {"attention": rng.lognormal(0, 1, (3, 2)) * scale, "mlp": mlp}
    return scores


def likelihood(scores: dict, variances: dict, scope_of) -> float:
    """Σ over scopes and estimators of the mean over the scope of I / (2 σ²) + log σ, unit by unit."""
    terms: dict = {}
    for name, by_structure in scores.items():
        for structure, values in by_structure.items():
            for layer, unit in np.argwhere(~np.isnan(values)):
                scope = scope_of(structure, layer)
                v = variances[name][scope]
                terms.setdefault((name, scope), []).append(values[layer, unit] / (2 * v) + np.log(v) / 2)
    return sum(float(np.mean(term)) for term in terms.values())


class TestClosedForm:
    def test_by_hand(self):
        scores = {"a": {"mlp": np.array([[1.0, 3.0]])}, "b": {"mlp": np.array([[10.0, 30.0]])}}
        fused = fuse(scores)
        assert fused.sigmas["a"]["mlp"] == pytest.approx(2**0.5)
        assert fused.weights["b"]["mlp"] == pytest.approx(1 / 40)
        np.testing.assert_allclose(fused.scores["mlp"], [[0.5, 1.5]], rtol=1e-12)
        assert fused.loss == pytest.approx(1 + (np.log(2) + np.log(20)) / 2)

    @pytest.mark.parametrize(
        ("scope", "scope_of"),
        [
            ("global", lambda name, layer: "global"),
            ("structure", lambda name, layer: name),
            ("layer", lambda name, layer: f"{name}/{layer}"),
        ],
    )
    def test_is_the_minimum_of_the_likelihood(self, scope, scope_of):
        scores = two()
        fused = fuse(scores, scope=scope)
        best = {name: {key: s**2 for key, s in each.items()} for name, each in fused.sigmas.items()}
        assert fused.loss == pytest.approx(likelihood(scores, best, scope_of), rel=1e-12)
        for name in best:
            for key in best[name]:
                for factor in (0.9, 1.1):
                    other = {**best, name: {**best[name], key: best[name][key] * factor}}
                    assert likelihood(scores, other, scope_of) > fused.loss + 1e-4

    @pytest.mark.parametrize("scope", SCOPES)
    def test_scores_are_divided_by_means_of_their_scope(self, scope):
        scores = two()
        fused = fuse(scores, scope=scope).scores
        both = {name: np.concatenate([each.ravel() for each in own.values()]) for name, own in scores.items()}
        for structure, values in fused.items():
            for layer, unit in np.argwhere(~np.isnan(values)):
                alike = {
                    "global": both,
                    "structure": {name: own[structure] for name, own in scores.items()},
                    "layer": {name: own[structure][layer] for name, own in scores.items()},
                }[scope]
                want = sum(scores[name][structure][layer, unit] / (2 * np.nanmean(alike[name])) for name in scores)
                assert values[layer, unit] == pytest.approx(want, rel=1e-12)
        for other in set(SCOPES) - {scope}:
            assert not np.allclose(fused["mlp"], fuse(scores, scope=other).scores["mlp"], equal_nan=True), "control"

    def test_scope_constant_shifts_each_scope_by_its_log_sigmas(self):
        scores = two()
        plain, shifted = fuse(scores), fuse(scores, scope_constant=True)
        for name in ("attention", "mlp"):
            want = sum(np.log(plain.sigmas[m][name]) for m in scores)
            difference = np.asarray(shifted.scores[name]) - np.asarray(plain.scores[name])
            np.testing.assert_allclose(difference[~np.isnan(difference)], want, rtol=1e-9)
            assert abs(want) > 0.1

    def test_missing_units_stay_missing_and_jax_arrays_are_taken(self):
        scores = {m: {n: jnp.asarray(v, jnp.float32) for n, v in s.items()} for m, s in two().items()}
        got = np.asarray(fuse(scores).scores["mlp"])
        assert (np.isnan(got) == np.isnan(two()["vector"]["mlp"])).all()
        np.testing.assert_allclose(got, fuse(two()).scores["mlp"], rtol=1e-5)


class TestLearned:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-12, 1e6), (1e6, 1e-12)])
    def test_agrees_with_the_closed_form(self, scope, scales):
        scores = two(scales=scales)
        learned, closed = fuse(scores, "learned", scope), fuse(scores, scope=scope)
        for name in scores:
            for key, sigma in closed.sigmas[name].items():
                assert learned.sigmas[name][key] == pytest.approx(sigma, rel=1e-4)
        for name in ("attention", "mlp"):
            np.testing.assert_allclose(learned.scores[name], closed.scores[name], rtol=1e-4)
        assert learned.loss == pytest.approx(closed.loss, abs=1e-6)

    def test_one_large_score_among_many_small_ones(self):
        values = np.full((2, 30_000), 1e-9)
        values[0, 0] = 1.0
        scores = {name: {"mlp": values} for name in ("a", "b")}
        assert fuse(scores, "learned").sigmas["a"]["mlp"] == pytest.approx(values.mean() ** 0.5, rel=1e-4)


class TestSampling:
    def examples(self, scales=(1.0, 1.0)) -> dict:
        rng = np.random.default_rng(5)
        scores = two(scales=scales)
        noise = {"vector": 0.1, "element": 0.4}
        return {
            m: {n: v[None] * rng.gamma(1 / noise[m], noise[m], (400, *v.shape)) for n, v in s.items()}
            for m, s in scores.items()
        }

    def test_takes_the_variance_over_examples_by_the_mean(self):
        per_example = self.examples()
        scores = {m: {n: v.mean(0) for n, v in s.items()} for m, s in per_example.items()}
        got = fuse(scores, "sampling", per_example=per_example)
        for m, by_structure in per_example.items():
            for n, values in by_structure.items():
                want = np.nansum(values.var(0)) / np.nansum(values.mean(0))
                assert got.sigmas[m][n] == pytest.approx(want**0.5, rel=1e-9)

    def test_an_estimators_unit_does_not_matter(self):
        got = [
            fuse(two(scales=scales), "sampling", per_example=self.examples(scales)).scores["mlp"]
            for scales in ((1.0, 1.0), (1e-6, 1e3))
        ]
        np.testing.assert_allclose(got[0], got[1], rtol=1e-9)
        assert np.nanmax(np.abs(got[0] - fuse(two()).scores["mlp"])) > 1e-2, "control"


REFUSED = {
    "two or more estimators": lambda s, e: s.pop("element"),
    "expected element to score the units that vector scores": lambda s, e: s["element"].pop("mlp"),
    "element to score the units that vector scores, got": lambda s, e: s["element"]["mlp"].__setitem__((0, 0), np.nan),
    "got -1 from element in scope mlp": lambda s, e: s["element"]["mlp"].__setitem__((1, 4), -1),
    "got inf from element in scope mlp": lambda s, e: s["element"]["mlp"].__setitem__((1, 4), np.inf),
    "all scores of element are zero in scope mlp": lambda s, e: s["element"].update(mlp=0 * s["element"]["mlp"]),
    "per-example scores of element for two examples or more, got those of: vector": lambda s, e: e.pop("element"),
    "scores of element for two examples or more": lambda s, e: e["element"].update(mlp=e["element"]["mlp"][:1]),
    "element that vary and have a mean above 0 in scope mlp": lambda s, e: e["element"].update(
        mlp=np.ones((400, 3, 40))
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("said", REFUSED)
    def test_what_cannot_be_fused(self, said):
        scores, examples = two(), TestSampling().examples()
        REFUSED[said](scores, examples)
        with pytest.raises(ValueError, match=said):
            fuse(scores, "sampling", per_example=examples)
