"""`saap export`: what is printed was measured on what was written, and failure leaves nothing behind."""

import itertools
import json
import os
import re

import gguf
import pytest

from saap_jax.cli import main
from saap_jax.config.use import ExportConfig
from saap_jax.export import command as job
from saap_jax.export.command import TOLERANCES, check_tokenizer, export_model
from saap_jax.export.widths import without_empty_layers
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.structures.discovery import count_parameters
from tests.export.models import EMPTY, LLAMA3, RAGGED, SPECS, UNIFORM, with_scaling
from tests.helpers import changed, random_model

FORMATS = ["padded", "ragged", "gguf"]


@pytest.fixture
def source(tokenizer, tmp_path):
    """Return a maker of saved models, with the tiny tokenizer: `source(spec)`."""

    def make(spec, **options):
        model = random_model(spec)
        return save_model(model, tmp_path / "source", **({"tokenizer": tokenizer} | options))

    return make


def export(source, out, form, dtype="float32"):
    return export_model(ExportConfig(model=str(source), out=str(out), format=form, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [*itertools.product(FORMATS, ("empty_biased",)), ("gguf", "empty")])
def test_every_format_is_verified(form, name, source, tokenizer, tmp_path):
    out, directory = tmp_path / ("x.gguf" if form == "gguf" else "x"), source(SPECS[name])
    model, exported = load_model(directory), export(directory, out, form)
    assert exported.agreement.deviation < 1e-5
    assert exported.agreement.argmax == 1
    assert exported.agreement.tokens == 96
    assert load_tokenizer(out).encode("the cat") == tokenizer.encode("the cat")
    assert load_model(out).spec.vocab == 300
    unread = 0  # norms of attention that is not there, which llama.cpp refuses
    if form == "gguf":
        names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
        left_out = [n for n in range(len(model.spec.layers)) if f"blk.{n}.attn_norm.weight" not in names]
        unread = len(left_out) * model.spec.embed
        assert (unread > 0) == (name == "empty")
    assert exported.written == exported.parameters + exported.added - unread
    assert exported.bytes == sum(p.stat().st_size for p in ([out] if out.is_file() else out.iterdir()))
    assert sorted(os.listdir(tmp_path)) == ["source", out.name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_rounding_is_measured(dtype, source, tmp_path):
    """Coarser types deviate more, each within what is accepted."""
    agreement = export(source(RAGGED), tmp_path / "x.gguf", "gguf", dtype).agreement
    assert TOLERANCES["float32"] < agreement.deviation < TOLERANCES[dtype]


def test_a_gguf_of_a_gguf_keeps_its_tokenizer(source, tmp_path):
    export(source(UNIFORM), tmp_path / "x.gguf", "gguf")
    export(tmp_path / "x.gguf", tmp_path / "y.gguf", "gguf", "q8_0")
    first, second = (gguf.GGUFReader(tmp_path / name).fields for name in ("x.gguf", "y.gguf"))
    keys = {key for key in first if key.startswith("tokenizer.")}
    assert len(keys) > 5
    for key in keys:
        assert second[key].contents() == first[key].contents()
        assert second[key].types == first[key].types


def wrong_model(model, *args, **kwargs):
    return changed(load_model(model), "segments/0/attention/value", lambda value: value * 1.01)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_export_is_found_and_not_kept(form, source, tmp_path, monkeypatch):
    directory = source(UNIFORM)
    loads = iter([load_model, wrong_model])
    monkeypatch.setattr(job, "load_model", lambda path: next(loads)(path))
    out = tmp_path / ("x.gguf" if form == "gguf" else "x")
    with pytest.raises(ValueError, match="within 0.0001 of the source's spread .* nothing was kept"):
        export(directory, out, form)
    assert os.listdir(tmp_path) == ["source"]


def test_a_tokenizer_that_splits_otherwise_is_found(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    check_tokenizer(tokenizer, load_tokenizer(tmp_path), "x")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected the tokenizer that was written to encode"):
        check_tokenizer(tokenizer, load_tokenizer(tmp_path), "x")


class TestCommand:
    @pytest.mark.slow
    def test_what_is_printed(self, source, capsys, tmp_path):
        directory = source(EMPTY)
        assert main.main(["export", str(directory), str(tmp_path / "x"), "--format", "padded"]) == 0
        text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
        present = without_empty_layers(load_model(directory))
        added = count_parameters(load_model(tmp_path / "x")) - count_parameters(present)
        assert f"zeros added by the format {added:,}" in text
        assert len(EMPTY.layers) - len(present.spec.layers) == 1
        assert "left out, computing nothing: 1 layer without heads and channels" in text
        assert "(accepted for float32: 0.0001)" in text
        assert "same most likely token 100.0%" in text

    def test_notes(self, source, capsys, tmp_path):
        directory = source(with_scaling(RAGGED, LLAMA3), tokenizer=None)
        words = ["export", str(directory), str(tmp_path / "x.gguf"), "--format", "gguf", "--dtype", "q8_0"]
        assert main.main(words) == 0
        text = capsys.readouterr().out
        assert "has no tokenizer" in text
        assert "7 matrices are F16: their rows are no multiple of 32" in text
        assert "architecture deci" in text

    def test_a_command_to_copy_holds_whatever_the_directory_is_called(self, source, capsys, tmp_path):
        out = tmp_path / "my model"
        assert main.main(["export", str(source(UNIFORM, tokenizer=None)), str(out), "--format", "nas"]) == 0
        assert f"vllm serve '{out}' --trust-remote-code" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["{source}", "{tmp}/x", "--anyway"], "anyway: expected --format tunix beside it"),
            (["{source}", "{tmp}/x"], "choose --format padded (a plain model with zeros"),
            (["{source}", "{tmp}/x", "--format", "gguf"], "expected a name.gguf for format gguf alone"),
            (["{source}", "{tmp}/x.gguf"], "expected a name.gguf for format gguf alone, got "),
            (
                ["{source}", "{tmp}/x", "--format", "padded", "--dtype", "q8_0"],
                "dtype: expected --format gguf beside it, got 'q8_0'",
            ),
            (["{source}", "{source}", "--format", "ragged"], "exists already and is never overwritten"),
            (["{tmp}/none", "{tmp}/x", "--format", "ragged"], "no such file or directory"),
            (
                ["{uniform}", "{tmp}/x", "--format", "tunix"],
                "Tunix turns heads of llama3 by a rotary base of 1,000,000",
            ),
            (["{source}"], "out: expected a path, got none"),
            ([], "model: expected a path, got none"),
            (["{source}", "a", "b"], "expected MODEL OUT first"),
        ],
    )
    def test_bad_input(self, words, message, source, capsys, tmp_path):
        directory = source(UNIFORM if "{uniform}" in words else RAGGED)
        places = {"source": directory, "uniform": directory, "tmp": tmp_path}
        assert main.main(["export", *(word.format(**places) for word in words)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == ["source"]
