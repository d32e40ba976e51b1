"""Tensors on their way into a file: widened by zeros, converted, and outputs that appear complete or not at all."""

import errno
import os

import numpy as np
import pytest

from saap_jax.llama import LayerWidths
from saap_jax.llama.files.write import Tensor, converted, model_tensors, new_output
from tests.llama.conftest import random_model, spec_of

SPEC = spec_of((2, 6), (1, 3))


def test_widened_tensors_hold_the_model_and_zeros():
    model = random_model(SPEC)
    wide = LayerWidths(kv_heads=3, q_per_kv=4, mlp=7)
    plain = {tensor.name: tensor.read() for tensor in model_tensors(model)}
    for tensor in model_tensors(model, [wide] * 2):
        values, before = tensor.read(), plain[tensor.name]
        assert values.shape == tensor.shape
        assert np.count_nonzero(values) == np.count_nonzero(before)
        if tensor.name == "model.layers.1.self_attn.q_proj.weight":  # rows: kv_heads, q_per_kv, head_dim
            np.testing.assert_array_equal(
                values.reshape(3, 4, 4, 16)[:1, :2], before.reshape(1, 2, 4, 16), err_msg="groups move apart"
            )


def test_narrower_widths_are_refused():
    narrow = LayerWidths(kv_heads=1, q_per_kv=2, mlp=6)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn.* or wider"):
        model_tensors(random_model(SPEC), [narrow] * 2)


def test_conversion_beyond_the_range_is_refused():
    tensor = Tensor("big", (2,), lambda: np.array([1.0, 1e5], np.float32))
    assert converted(tensor, np.dtype(np.float32)).tolist() == [1.0, 1e5]
    with pytest.raises(ValueError, match=r"big: holds values up to 1e\+05, beyond the range of float16"):
        converted(tensor, np.dtype(np.float16))
    assert converted(tensor._replace(read=lambda: np.ones(2, np.float32)), np.dtype(np.float16)).dtype == np.float16


@pytest.mark.parametrize("suffix", [None, ".bin"])
def test_an_output_appears_when_it_is_complete(tmp_path, suffix):
    target = tmp_path / "deep" / "out"
    with new_output(target, "it", suffix=suffix) as place:
        (place if suffix else place / "file").write_text("x")
        assert not target.exists()
    assert target.is_file() if suffix else (target / "file").is_file()
    assert os.listdir(target.parent) == ["out"]
    with pytest.raises(FileExistsError, match="never overwritten"), new_output(target, "it"):
        pytest.fail("an existing output was opened")


def fail(target, suffix, error):
    with new_output(target, "it", suffix=suffix) as place:
        (place if suffix else place / "file").write_text("half")
        raise error


@pytest.mark.parametrize("suffix", [None, ".bin"])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), FileNotFoundError("ours")])
def test_nothing_is_left_behind(tmp_path, suffix, error):
    with pytest.raises(type(error)) as raised:
        fail(tmp_path / "out", suffix, error)
    assert raised.value is error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_says_what_was_not_saved(tmp_path):
    with pytest.raises(OSError, match=r"out: it was not saved \(No space left") as error:
        fail(tmp_path / "out", None, OSError(errno.ENOSPC, "No space left on device"))
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
