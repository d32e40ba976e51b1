"""Targets are read as clouds spell them, and nonsense is refused in a sentence."""

import pytest

from saap_jax.planning.chips import CHIPS, target_of, targets


@pytest.mark.parametrize(
    ("name", "topology", "chips", "devices"),
    [
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5e:2x4", "v5e:2x4", 8, 8),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v5p-64", "v5p:2x4x4", 32, 32),
        ("v4-8", "v4:2x2x1", 4, 8),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128),
        ("tpu:8t:256", "tpu:8t:256", 256, 256),
        ("gpu:h100:8", "gpu:h100:8", 8, 8),
        ("gpu:b200:8", "gpu:b200:8", 8, 8),
    ],
)
def test_targets(name, topology, chips, devices):
    target = target_of(name)
    assert (target.topology, target.chips, target.devices) == (topology, chips, devices)
    assert target.memory * target.chip.devices == target.chip.memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-17", "expected one of v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5p-63", "expected one of v5p-8"),
        ("v7:2x2", "with a kind of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e:4x4x4", "expected 2 sizes that multiply to at most 256 chips"),
        ("v5e:32x32", "at most 256 chips"),
        ("v5p:2x2", "expected 3 sizes"),
        ("h100:8", "with a word of tpu:8t, tpu:8i, gpu:a100, gpu:h100, gpu:h200, gpu:b200, such as gpu:h100:8"),
        ("gpu:v5e:8", "such as gpu:h100:8"),
        ("gpu:8t:8", "such as gpu:h100:8"),
        ("8t:4x4x4", "such as gpu:h100:8"),
        ("gpu:h100:9", "expected 1 to 8 that reach each other"),
        ("", "expected KIND:SHAPE"),
    ],
)
def test_nonsense_is_refused(name, message):
    with pytest.raises(ValueError, match="target: ") as error:
        target_of(name)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", sorted(CHIPS))
def test_machines_double(kind):
    chips = [target.chips for target in targets(CHIPS[kind])]
    assert chips == sorted(set(chips))
    assert chips[-1] <= CHIPS[kind].most < 2 * chips[-1]
    chip = CHIPS[kind]
    assert target_of(f"{kind}-8" if chip.compiled else f"{chip.word}:1").shape
