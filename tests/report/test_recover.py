"""What `saap recover` says it changed: against what, on which text, how surely."""

import numpy as np
import pytest

from saap_jax.report.kinds.recover import changes, recovery_table
from saap_jax.runtime.words import MINUS

IN, OUT = "ppl@128 text:a", "ppl@128 text:b"


def record(windows: int, shift: float = -0.2, dense: bool = True) -> dict:
    """Return an invented run: recovery changes the loss of each window by about `shift`."""
    random = np.random.default_rng(0)
    before = {name: random.normal(4, 1, windows) for name in (IN, OUT)}
    after = {name: losses + shift + 0.01 * random.normal(size=windows) for name, losses in before.items()}
    run = {
        key: {
            "parameters": 10,
            "bytes": 40,
            "ppl": {name: float(np.exp(values.mean())) for name, values in losses.items()},
            "losses": {name: values.tolist() for name, values in losses.items()},
        }
        for key, losses in (("before", before), ("after", after), ("dense", {n: v - 1 for n, v in before.items()}))
    }
    if not dense:
        del run["dense"]
    return run | {"metrics": [{"name": IN, "domain": "in"}, {"name": OUT, "domain": "out"}]}


def test_says_against_what_it_changed_and_on_which_text():
    run = record(24)
    first, second = changes(run)
    before, after, dense = (run[key]["ppl"][IN] for key in ("before", "after", "dense"))
    assert first.startswith(f"{IN} on 24 windows in domain: recovered {after:.2f}, ")
    assert f"{100 * (after / before - 1):+.1f} % (".replace("-", MINUS) in first
    assert f" against the model before ({before:.2f}) and " in first
    assert f" against the dense model ({dense:.2f})" in first
    assert second.startswith(f"{OUT} on 24 windows out of domain: ")
    assert recovery_table(run).header[-1] == "change from pruned"


@pytest.mark.parametrize(("windows", "shift"), [(4, -0.2), (24, -0.0005)])
def test_of_few_windows_and_small_changes_nothing_is_sure(windows, shift):
    (first, _) = changes(record(windows, shift, dense=False))
    if windows < 8:
        assert "which takes 8 windows; here are 4" in first
        assert " to " not in first
    else:
        assert "not to be told apart" in first
    assert "dense" not in first
    assert "told apart" not in changes(record(24))[0], "negative control"


def test_a_run_that_has_not_come_to_its_end():
    run = record(24)
    del run["after"]
    assert changes(run) == []
