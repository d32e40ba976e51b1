"""One against many: the same as one against one, for each."""

import math

import numpy as np
import pytest

from saap_jax.evaluation.differences import differences_against, p_values_against


def losses(variants: int = 4, seeds: int = 1, windows: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    base = random.normal(4, 1, (seeds, windows))
    return base, base + 0.05 * np.arange(variants)[:, None, None] + random.normal(0, 0.1, (variants, seeds, windows))


class TestDifferences:
    def test_do_not_depend_on_company(self):
        base, others = losses(seeds=3)
        together = differences_against(base, others, resamples=2500)
        alone = [differences_against(base, other[None], resamples=2500)[0] for other in others]
        np.testing.assert_allclose(together, alone, rtol=1e-9)
        assert together[0] != together[1]

    def test_of_losses_that_are_not_finite_are_unknown_and_disturb_nobody(self):
        base, others = losses()
        plain = differences_against(base, others, resamples=100)
        others[1, 0, 3], others[2, 0, 4], others[2, 0, 5] = math.inf, math.nan, -math.inf
        found = differences_against(base, others, resamples=100)
        np.testing.assert_allclose([found[0], found[3]], [plain[0], plain[3]])
        assert all(math.isnan(number) for each in found[1:3] for number in (each.low, each.high, each.p_value))
        assert found[1].value == math.inf
        assert plain[1].value != math.inf

    def test_give_the_p_values(self):
        base, others = losses(seeds=2)
        wanted = [each.p_value for each in differences_against(base, others)]
        assert p_values_against(base, others).tolist() == wanted
        assert wanted[0] > 0.05 > wanted[3]

    @pytest.mark.parametrize(("windows", "resamples"), [(0, 10), (2, 0)])
    def test_refuse_no_window_and_no_resample(self, windows, resamples):
        with pytest.raises(ValueError, match="of one window or more|resamples >= 1"):
            differences_against(*losses(windows=windows), resamples=resamples)

    def test_of_nobody(self):
        assert differences_against(losses()[0], np.zeros((0, 1, 12))) == []
