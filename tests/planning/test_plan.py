"""Plans by arithmetic, the search over machines, messages; programs that are compiled are tested where libtpu is."""

import dataclasses
import json
import sys
from math import prod

import jax
import jax.numpy as jnp
import pytest

from saap_jax.cli.main import main
from saap_jax.config.mesh import MESH_AXES, MeshConfig
from saap_jax.config.use import PlanConfig
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.quantized import MATRICES
from saap_jax.llama.spec import Constants, LayerWidths, LlamaSpec
from saap_jax.planning import plan
from saap_jax.planning.chips import CHIPS, GIB, target_of, targets
from saap_jax.planning.count import shard_bytes
from saap_jax.planning.estimate import estimate, meshes
from saap_jax.planning.models import KNOWN, spec_of
from saap_jax.planning.plan import overrun_of, plan_one, remedies, search, settings_of, work_of_device
from saap_jax.planning.programs import program_of
from saap_jax.runtime.mesh import RULES, Layout, layout_of
from saap_jax.structures.discovery import count_parameters

SEVEN = spec_of("llama-2-7b")


def test_without_libtpu_the_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main(["plan", "llama-2-7b", "v5e-16"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("run pip install 'saap_jax[tpu-plan]'")


def test_a_model_may_be_a_file(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert spec_of(str(tmp_path)) == spec_of(str(tmp_path / "config.json"))
    assert spec_of(str(tmp_path)).embed == 64
    with pytest.raises(ValueError, match="model: expected one of llama-7b"):
        spec_of("llama-9b")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-2-70b", 68.977), ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.554), ("llama-3.1-405b", 405.853), ("gemma-3-27b", 27.009), ("qwen3-30b-a3b", 30.532),
    ],
)  # fmt: skip
def test_models_have_the_parameters_that_are_published(name, billions):
    assert count_parameters(abstract_llama(KNOWN[name])) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_estimates_go_the_right_way():
    config = PlanConfig()

    def peak(mesh=(1, 16, 1), batch=16, remat="full", **changes):
        return estimate(dataclasses.replace(config, **changes), SEVEN, mesh, batch, remat).peak

    assert peak(remat="full") < peak(remat="dots") < peak(remat="none")
    assert peak(batch=16) < peak(batch=32)
    assert peak(mesh=(1, 16, 1)) < peak(mesh=(2, 8, 1)) < peak(mesh=(16, 1, 1))
    assert peak(estimators=("gate_fisher",)) < peak(estimators=("taylor_element",)) < peak()
    assert peak(task="evaluate") < peak(task="recover", method="lora") < peak(task="recover", method="full")


def test_meshes_divide_the_model():
    found = meshes(16, SEVEN)
    assert (1, 16, 1) in found
    assert (16, 1, 1) in found
    assert (2, 4, 2) in found
    assert all(data * fsdp * tensor == 16 for data, fsdp, tensor in found)
    odd = dataclasses.replace(SEVEN, layers=tuple(dataclasses.replace(w, kv_heads=3) for w in SEVEN.layers))
    assert all(tensor == 1 for *_, tensor in meshes(16, odd))


MIXTURE = spec_of("qwen3-30b-a3b")


def test_meshes_of_a_mixture_may_have_an_axis_for_experts():
    found = meshes(16, MIXTURE)
    assert {mesh for mesh in found if len(mesh) == 3} == {mesh for mesh in meshes(16, SEVEN) if mesh[2] <= 4}
    assert {mesh[3:] for mesh in found} == {(), (2,), (4,), (8,), (16,)}
    assert all(prod(mesh) == 16 and 128 % prod(mesh[2:]) == 0 for mesh in found)
    assert (1, 2, 2, 4) in found
    assert all(len(mesh) == 3 for mesh in meshes(16, SEVEN)), "never of a dense model"
    few = dataclasses.replace(MIXTURE, layers=tuple(dataclasses.replace(w, mlp=6) for w in MIXTURE.layers))
    assert {mesh[3:] for mesh in meshes(12, few)} == {(), (2,), (3,), (6,)}


@pytest.mark.parametrize(("task", "passes"), [("evaluate", 1), ("recover", 4)])
def test_a_device_is_as_one_of_a_model_with_its_part_of_the_experts(task, passes):
    config = PlanConfig(task=task, method="full")
    part = dataclasses.replace(MIXTURE, layers=tuple(dataclasses.replace(w, mlp=16) for w in MIXTURE.layers))
    spread, expected = estimate(config, MIXTURE, (1, 4, 1, 8), 4, "full"), estimate(config, part, (1, 4, 1), 4, "full")
    assert spread.parameters == expected.parameters < estimate(config, MIXTURE, (1, 4, 1), 4, "full").parameters / 4
    assert spread[2:5] == expected[2:5], "temporaries, operations, memory traffic"
    stream = config.length * MIXTURE.embed * 2 * 48  # bytes of a row in front of all layers
    assert spread.sent - expected.sent == pytest.approx(2 * 7 / 8 * passes * stream), "a sum behind each mixture"


def test_a_mixture_is_planned_with_experts_spread(capsys):
    words = ["plan", "qwen3-30b-a3b", "gpu:h100:8", "--task", "evaluate", "--mesh.expert", "4"]
    assert main([*words, "--length", "512"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(8 chips; fsdp 2 x expert 4)" in said
    assert "Settings: --mesh.data 1 --mesh.fsdp 2 --mesh.tensor 1 --mesh.expert 4 --batch 2" in said
    assert main(["plan", "llama-2-7b", "gpu:h100:8", "--mesh.expert", "4"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "mesh.expert: expected 1 for a model without experts, got 4 for llama-2-7b" in line


def test_experts_are_computed_once_and_the_rest_by_each_device():
    """Of one layer without heads: each product of the MLP by hand, the router's and the logits' whole."""
    widths = LayerWidths(kv_heads=0, q_per_kv=1, mlp=8, channels=3)
    spec = LlamaSpec(vocab=10, embed=4, head_dim=2, layers=(widths,), tied=True, constants=MIXTURE.constants)
    jaxpr = jax.make_jaxpr(lambda model, tokens: model(tokens))(abstract_llama(spec), jnp.zeros((2, 5), jnp.int32))
    tokens, experts, rest = 10, 2 * 3 * 4 * 8 * 3, 2 * 4 * (8 + 10)
    assert work_of_device(jaxpr, spec, (1, 1, 1))["flops"] == tokens * (experts + rest)
    assert work_of_device(jaxpr, spec, (1, 2, 1))["flops"] == tokens * (experts + rest) / 2
    assert work_of_device(jaxpr, spec, (1, 2, 1, 4))["flops"] == tokens * (experts / 8 + rest / 2)


def test_a_plan_for_gpus_is_arithmetic():
    config = PlanConfig(task="evaluate")
    record = plan_one(config, SEVEN, target_of("gpu:h100:8"), None, 0, "full")
    assert record["fits"]
    assert record["source"] == "arithmetic"
    assert record["batch"] == 8
    assert record["step_seconds"] == max(record["seconds"].values()) == record["seconds"][record["bound"]]
    assert record["tokens_per_second"] == pytest.approx(8 * 2048 / record["step_seconds"])
    assert record["chip_hours"] == pytest.approx(16 * record["step_seconds"] * 8 / 3600)


def test_what_does_not_fit_comes_with_remedies():
    config = PlanConfig(batch=32, remat="none")
    record = plan_one(config, SEVEN, target_of("gpu:h100:2"), None, 32, "none")
    assert not record["fits"]
    assert record["overrun"] > 0
    assert len(record["remedies"]) == 3
    assert any(each.startswith("--remat full: saves about") for each in record["remedies"])


def test_remedies_save_what_they_say():
    target = target_of("v5e-4")
    found = remedies(PlanConfig(), SEVEN, target, (2, 2, 1), 8, "full", 1 * GIB)
    assert any("--mesh.data 1 --mesh.fsdp 4" in each for each in found)
    saved = (
        estimate(PlanConfig(), SEVEN, (2, 2, 1), 8, "full").peak
        - estimate(PlanConfig(), SEVEN, (1, 4, 1), 8, "full").peak
    )
    assert any(f"{saved / GIB:.1f} GiB" in each for each in found)


def test_the_search_takes_the_smallest_machine_and_the_fastest_way_on_it():
    config, asked = PlanConfig(task="evaluate"), []

    def plan(config, spec, machine, mesh, batch, remat):
        asked.append(machine.chips)
        guess = estimate(config, spec, mesh, batch, remat)
        return {
            "target": machine.topology, "fits": machine.chips >= 4, "batch": batch,
            "step_seconds": max(guess.seconds(machine).values()),
        }  # fmt: skip

    best, tried = search(config, SEVEN, targets(CHIPS["a100"]), plan=plan)
    assert best is not None
    assert best["target"] == "gpu:a100:4"
    assert asked == sorted(asked)
    assert max(asked) == 4
    here = [record for record in tried if record["fits"]]
    assert best["step_seconds"] / best["batch"] == min(r["step_seconds"] / r["batch"] for r in here)
    one, few = search(config, SEVEN, targets(CHIPS["a100"]), enough=1, plan=plan)
    assert one == best, "the fastest by arithmetic comes first"
    assert [record["fits"] for record in few].count(True) == 1 < len(here)
    none, tried = search(config, SEVEN, targets(CHIPS["a100"]), plan=lambda *a: plan(*a) | {"fits": False})
    assert none is None
    assert tried


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 4.75),
        ("required for HLO temporaries (27.07G) exceeds available HBM (15.75G). HLO", 11.32),
        ("Exceeded hbm capacity by 512.0M.", 0.5),
        ("something else went wrong", None),
    ],
)
def test_overruns_are_read_from_the_compilers_message(message, gibibytes):
    found = overrun_of(message)
    assert found is None if gibibytes is None else found == pytest.approx(gibibytes * GIB)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["plan", "llama-2-7b", "gpu:h100:8", "--task", "evaluate", "--json", str(out)]
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "evaluate of llama-2-7b on gpu:h100:8" in text
    assert "by arithmetic alone" in text
    record = json.loads(out.read_text())["plan"]
    assert settings_of(record) in text
    assert main([*words[:-1], str(tmp_path / "none" / "plan.json")]) == 2
    refused = capsys.readouterr()
    assert "json: expected a file in a directory that exists" in refused.err
    assert not refused.out
    assert main(["plan", "llama-2-70b", "gpu:a100:1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit gpu:a100:1: it needs" in text
    assert "GiB more than the 72.7 GiB of a device that arithmetic allows." in text, "92 % of 79 GiB"
    assert main(["plan", "llama-2-70b", "gpu:a100:1", "--search", "--task", "recover", "--method", "full"]) == 0
    assert "does not fit any a100 machine" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "c"], "expected [MODEL] [TARGET] first"),
        (["--mesh.fsdp", "3", "--target", "gpu:h100:8"], "mesh: expected"),
    ],
)
def test_bad_words(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_long_rows_hold_some_of_their_scores(capsys):
    """By arithmetic as compiled: of 32 heads 128 queries at once, in place of 8,192."""
    whole, usual = (PlanConfig(length=8192, remat="full", attention=path) for path in ("plain", "auto"))
    held = [estimate(config, SEVEN, (1, 16, 1), 16, "full") for config in (whole, usual)]
    assert held[0].peak - held[1].peak == 2 * 6 * 32 * 8192 * (8192 - 128)
    assert held[0].memory_bytes == held[1].memory_bytes
    of_short = [dataclasses.replace(config, length=2048) for config in (whole, usual)]
    assert len({estimate(config, SEVEN, (1, 16, 1), 16, "full").peak for config in of_short}) == 1
    for options, proposed in (["--attention", "plain"], True), ([], False):
        assert main(["plan", "llama-2-7b", "gpu:a100:1", "--length", "8192", *options]) == 0
        said = capsys.readouterr().out
        assert "does not fit" in said
        assert ("--attention auto: saves about" in said) is proposed


WORDS = 2**18
"""As Gemma has them: their product is most of the work, and their logits come in chunks."""


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    ("method", "vocab"),
    [
        ("magnitude", 512), ("wanda", 512), ("obs", 512), ("gate_fisher", 512), ("taylor_element_second", 512),
        ("taylor_element_second", WORDS), ("gate_fisher(objective='sampled')", WORDS), ("full", WORDS), ("lora", WORDS),
    ],
)  # fmt: skip
def test_arithmetic_counts_what_the_program_does(method, vocab, remat):
    """Where nothing is differentiated there is no backward pass, and where gates are, none of weights."""
    trains = method in ("full", "lora")
    fields = {"task": "recover", "method": method} if trains else {"estimators": (method,)}
    widths = LayerWidths(kv_heads=4, q_per_kv=2, mlp=768)
    spec = LlamaSpec(vocab=vocab, embed=256, head_dim=32, layers=(widths,) * 2, tied=True)
    length = 128 if vocab == WORDS else 64
    config = PlanConfig(**fields, length=length, dtype="float32", examples=4, attention="plain", remat=remat)
    program = program_of(config, spec, layout_of(MeshConfig(), jax.devices()[:1]), 4, remat)
    guess = estimate(config, spec, (1, 1, 1), 4, remat)
    assert guess.flops == pytest.approx(work_of_device(program.trace().jaxpr, spec, (1, 1, 1))["flops"], rel=0.15)
    held = (program.parameters[0], program.state) if trains else program.state
    assert guess.state == pytest.approx(shard_bytes(held), rel=1e-3)


def test_estimators_with_passes_of_their_own_are_not_planned_for():
    config = PlanConfig(estimators=("gate_hessian",))
    with pytest.raises(ValueError, match="expected none that needs gate_hessian, whose passes are not planned for"):
        plan_one(config, SEVEN, target_of("gpu:h100:8"), None, 0, "full")


@pytest.mark.parametrize("method", ["lora", "groupwise"])
def test_a_mixture_recovers_by_its_attention(method):
    """As the command does, which refuses adapters of experts; those of another model are beside all matrices."""
    constants = Constants(family="qwen3_moe", experts_per_token=2)
    widths = LayerWidths(kv_heads=1, q_per_kv=2, mlp=4, channels=8)
    mixture = LlamaSpec(vocab=24, embed=128, head_dim=128, layers=(widths,), tied=True, constants=constants)
    plain = dataclasses.replace(
        mixture, layers=(dataclasses.replace(widths, mlp=128, channels=None),), constants=Constants()
    )
    layout, config = layout_of(MeshConfig(), jax.devices()[:1]), PlanConfig(task="recover", method=method, length=8)
    adapted = {}
    for name, spec in (("mixture", mixture), ("plain", plain)):
        trained, _ = program_of(config, spec, layout, 1, "full").parameters
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(trained)
        ]
        assert estimate(config, spec, (1, 1, 1), 1, "full").state == 12 * sum(x.size for x in jax.tree.leaves(trained))
        adapted[name] = {part for path in paths for part in path.split("/") if part in MATRICES}
    assert adapted == {"mixture": {"query", "key", "value", "output"}, "plain": set(MATRICES)}


@pytest.mark.parametrize("method", ["lora", "groupwise", "full"])
def test_recovery_holds_what_its_arrays_take(method):
    """Of adapters and of quantised matrices the outputs are spread over fsdp, and nothing over tensor.

    The model as it was loaded is held too; LoRA trains beside it.
    """
    mesh, config = (1, 4, 2), PlanConfig(task="recover", method=method)
    layout = Layout(jax.sharding.AbstractMesh(mesh, MESH_AXES), RULES)
    program, guess = program_of(config, SEVEN, layout, 4, "full"), estimate(config, SEVEN, mesh, 4, "full")
    trained, frozen = program.parameters
    assert guess.parameters == pytest.approx(shard_bytes((frozen, program.beside)), rel=1e-3)
    assert guess.state == pytest.approx(shard_bytes((trained, program.state)), rel=1e-3)
    assert guess.parameters > 2 * count_parameters(abstract_llama(SEVEN, jnp.bfloat16)) / 8 * 0.999


@pytest.mark.parametrize(("method", "fits"), [("lora", True), ("full", True), ("full", False)])
def test_a_compiled_plan_counts_the_model_that_was_loaded(method, fits, monkeypatch):
    """The training trains a copy, in float32, of which the program's own memory has no more."""
    told = {"bytes": {"temporaries": 10, "peak": 100}, "overrun": -5} if fits else {"overrun": 5}
    monkeypatch.setattr(plan, "_devices", lambda target: jax.devices()[:1])
    monkeypatch.setattr(plan, "remembered", lambda about, make: told)
    spec = LlamaSpec(vocab=24, embed=8, head_dim=8, layers=(LayerWidths(kv_heads=1, q_per_kv=1, mlp=4),), tied=True)
    config = PlanConfig(task="recover", method=method, length=8, attention="plain")
    one = (1, 1, 1)
    guess = estimate(config, spec, one, 1, "full")
    found = plan.compiled(config, spec, target_of("v5e-1"), one, 1, "full", guess)
    loaded = 2 * (24 * 8 + 4 * 8 * 8 + 3 * 8 * 4 + 3 * 8) if method == "full" else 0
    assert found["overrun"] == told["overrun"] + loaded
    assert found["bytes"].get("peak", 100 + loaded) == 100 + loaded
    assert found["bytes"]["temporaries"] == 10 if fits else "temporaries" not in found["bytes"]


def test_a_plan_says_how_many_rows_there_are(capsys):
    for examples, said in ((1, "1 row in 1 step:"), (10, "10 rows in 3 steps:")):
        words = ["llama-7b", "gpu:h200:1", "--task", "evaluate", "--batch", "4", "--examples", str(examples)]
        assert main(["plan", *words]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
