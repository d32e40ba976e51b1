"""The arena end to end on a tiny model; and README.md and docs/arena.md held against the files that they come from."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import arena
import arena_report as made
import numpy as np
import pytest
from scipy import stats

from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from tests.helpers import changed, reference

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"


ROW = arena.Arena._row
SEEDS = (3, 4)
CHAINS = {
    "default": "wanda > uniform > least_squares",
    "default[:2]": "wanda > uniform",
    "flap": "flap",
    "saap": "magnitude > global",
    "nothing": "magnitude > within(max_ratio={attention: 0.01, mlp: 0.01}) > uniform",
}


GROUPS = {"saap-in-groups": "magnitude > within(max_ratio={attention: 0}, multiple_of={mlp: 4}) > uniform"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two texts, one of four articles, and little of everything."""
    place, random = tmp_path_factory.mktemp("arena"), np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "log", "a", "house", "stood"]
    some = lambda many: " ".join(random.choice(words, many))  # noqa: E731
    rows = [row for many in (40, 200, 90, 60) for row in (f" = {some(1)} = ", f" {some(many)} ")]
    (place / "wiki.txt").write_text("".join(f" \n{row}\n" for row in rows))
    for name, many in (("ptb", 300), ("own", 600)):
        (place / f"{name}.txt").write_text(f" {some(many)} \n")
    texts = {"WikiText-2": f"wikitext:{place}/wiki.txt", "Penn Treebank": f"ptb:{place}/ptb.txt"}
    return arena.Setting(
        texts=texts, calibration=f"own=text:{place}/own.txt", training=(f"text:{place}/own.txt",),
        examples=4, length=16, windows=12, first=4, docs=place / "docs", timed=3, group_size=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    """A model that is nearly even: its words have small logits."""
    even = changed(load_model(tiny_model_directory), "embedding", lambda each: each / 10)
    return str(
        save_model(even, tmp_path_factory.mktemp("even") / "tiny", tokenizer=load_tokenizer(tiny_model_directory))
    )


@pytest.fixture(scope="module")
def ran(setting, model):
    """The directory of the files of two seeds, taken up again after the first row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "STEPS", 6)
        patch.setenv("SAAP_DATA", str(setting.docs.parent))
        tasks = setting.docs.parent / "zeroshot"
        tasks.mkdir()
        items = [{"context": "the cat", "choices": ["sat", "dog"], "gold": each % 2} for each in range(4)]
        (tasks / "boolq.jsonl").write_text("".join(json.dumps(each) + "\n" for each in items))
        cache = setting.docs.parent / "cache"
        first = {"default": CHAINS["default"]}
        arena.run(model, SEEDS, first, (0.2,), cache, setting)
        arena.run(model, SEEDS, CHAINS, (0.5,), cache, setting)
        arena.run(model, SEEDS, first, (0.2,), cache, setting, after="lora", tasks=True)
        arena.run(model, SEEDS, GROUPS, (0.2,), cache, setting)
        arena.run(model, SEEDS, GROUPS, (0.2,), cache, setting, tasks=True)
        arena.run(model, SEEDS, GROUPS, (0.2,), cache, setting, after="groupwise", tasks=True)
        patch.setattr(arena.Arena, "_row", None)  # nothing is done again
        arena.run(model, SEEDS, first, (0.2, 0.5), cache, setting)
        arena.run(model, SEEDS, first, (0.2,), cache, setting, after="lora")
        with pytest.raises(TypeError):  # control: of another chain under the name all is
            arena.run(model, [3], {"flap": "magnitude > uniform"}, (0.5,), cache, setting)
        yield setting.docs


def files(docs: Path) -> list[dict]:
    """Read the files, by seed."""
    return [json.loads(path.read_text()) for path in sorted((docs / "arena").glob("claims-*.json"))]


@pytest.mark.slow
def test_what_a_file_has(ran, setting):
    found = files(ran)
    assert len(found) == 2
    for each in found:
        assert set(each["rows"]) == {"default@0.2", "saap-in-groups@0.2", *(f"{name}@0.5" for name in CHAINS)}
        assert sorted(set(each["articles"]["WikiText-2"])) == [1, 2, 3, 4]
        assert len(set(each["articles"]["Penn Treebank"])) == 12, "stretches, of which 12 windows are a unit each"
        assert {len(losses) for losses in each["dense"].values()} == {12}
    timed, shared = (each["rows"]["default@0.5"] for each in found[:2])
    assert "scoring" in timed
    assert timed["gib"] > 0
    assert "scoring" not in shared
    assert timed["chain"] == [["score", "wanda"], ["allocation", "uniform"], ["repair", "least_squares"]]
    assert "failed" in found[0]["rows"]["nothing@0.5"]
    assert found[0]["rows"]["default@0.2"]["losses"] != found[1]["rows"]["default@0.2"]["losses"]
    before, text = found[1]["rows"]["default@0.2"], "Penn Treebank"
    after = before["after"]
    assert np.mean(after["losses"][text]) < np.mean(before["losses"][text])
    assert re.fullmatch("[01]{4}", after["tasks"]["boolq"])
    assert {each["tasks"]["boolq"] for each in found} <= {"1010", "0101"}, "unpruned; its choice is always the same"


def test_accuracy_by_hand():
    """Of two tasks of two items, and two seeds; by item, differences from the unpruned model."""
    known, dense = [{"a": "10", "b": "11"}, {"a": "10", "b": "01"}], {"a": "11", "b": "11"}
    seeds, items = np.var([0.75, 0.5], ddof=1) / 2, (np.var([1, 0], ddof=1) + np.var([0.5, 1], ddof=1)) / 2 / 4
    freedom = (seeds + items) ** 2 / (seeds**2 / 1 + items**2 / 2)
    error = 100 * max(stats.t.ppf(0.975, freedom) * np.sqrt(seeds + items), stats.t.ppf(0.975, 1) * np.sqrt(seeds))
    assert made.accuracy(known) == f"62.5 ± {error:.1f}"
    assert made.accuracy(known, [dense] * 2) == f"-37.5 ± {error:.1f}"
    assert made.accuracy(known[:1], known[:1]) == "+0.0 ± 0.0"
    assert made.accuracy(known[:1]) == f"75.0 ± {196 * np.sqrt(np.var([1, 0], ddof=1) / 2 / 4):.1f}"
    assert made.accuracy([]) == "–"


def test_accuracy_differs_by_item_from_defaults():
    """Answers of 4 and of 2 items: those that both have, pair by pair; seeds that one of them lacks do not count."""
    default = made.Line("default", "ours", 0.2, {"3": {"tasks": {"a": "1011"}}, "4": {"tasks": {"a": "10"}}})
    other = made.Line("flap", "published", 0.2, {"3": {"tasks": {"a": "00"}}, "5": {"tasks": {"a": "11"}}})
    paired = 196 * np.sqrt(np.var([1, 0], ddof=1) / 2)
    assert f"from default: -50.0 ± {paired:.1f} (paired)" in other.accuracy({"a": "1111"}, default)
    assert f"from default: {made.accuracy([{'a': '00'}], [{'a': '10'}])} (paired)" in other.accuracy({}, default)
    assert "from default" not in default.accuracy({"a": "1111"}, default)
    assert "from default" not in other._replace(found={"5": other.found["5"]}).accuracy({}, default), "no seed of both"


@pytest.mark.slow
def test_more_items_take_the_place_of_fewer(setting, model, ran, tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    items = [{"context": "the cat", "choices": ["sat", "dog"], "gold": each} for each in (1, 0)]
    shutil.copytree(ran, docs)
    (tmp_path / "zeroshot").mkdir()
    (tmp_path / "zeroshot" / "boolq.jsonl").write_text("".join(json.dumps(each) + "\n" for each in items * 3))
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    asked, one = {"default": CHAINS["default"]}, setting._replace(docs=docs)

    def answers(items: int) -> list[str]:
        arena.run(model, [4], asked, (0.2,), tmp_path, one._replace(items=items), tasks=True)
        found = files(docs)[1]
        return [each["tasks"]["boolq"] for each in (found, found["rows"]["default@0.2"])]

    assert [len(each) for each in answers(5)] == [5, 5]
    five = answers(5)
    assert answers(3) == five, "fewer are there already"
    assert [each[:5] for each in answers(200)] == five
    assert [len(each) for each in answers(200)] == [6, 6], "all, where there are fewer"
    monkeypatch.setattr(arena.Arena, "_further", None)  # nothing is done again
    answers(6)


@pytest.mark.parametrize("source", ["WikiText-2", "Penn Treebank"])
def test_fresh_windows_share_no_token(setting, model, source):
    """Of texts whose tokens are all different: with the drawn windows, the older ones, and other sets."""
    words, of = load_tokenizer(model), setting.texts[source]
    size = arena.tokenize(arena.join_texts(arena.read_texts(of, "evaluation")), words).size
    length, some = setting.length - len(arena.beginning(words)), setting._replace(windows=4, older=1)
    numbers = np.arange(size, dtype=np.int32)
    drawn = {*arena.stratified_windows(numbers, 4, length, setting.drawn).ravel()}
    sets = [arena.fresh_windows(of, words, some._replace(fresh=each)) for each in (1, 2)]
    tokens = [{each * length + at for each in chosen for at in range(length)} for chosen in sets]
    assert [len(each) for each in tokens] == [4 * length] * 2
    for a, b in itertools.combinations([{*range(length)}, drawn, *tokens], 2):
        assert {*a} & {*b} <= {*range(length)} & drawn, "only what was there before"
    whole = arena.evaluation_windows(of, words, setting.length).tokens
    found, again = (arena.text_of(of, words, some._replace(fresh=2)) for _ in range(2))
    np.testing.assert_array_equal(np.sort(found.windows.tokens, 0), np.sort(whole[sets[1]], 0))
    np.testing.assert_array_equal(found.windows.tokens, again.windows.tokens)
    assert found.articles == again.articles
    assert len(found.articles) == 4
    with pytest.raises(ValueError, match=r"^windows: expected one of the \d+ sets of 4 that .+, got fresh:99; take a "):
        arena.text_of(of, words, some._replace(fresh=99))


@pytest.mark.slow
def test_fresh_windows_are_a_group_of_their_own(setting, model, ran, tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    shutil.copytree(ran, docs)
    fresh = setting._replace(docs=docs, windows=4, first=2, older=0, fresh=1)
    monkeypatch.setattr(arena.Arena, "_row", ROW)
    arena.run(model, SEEDS, {"flap": CHAINS["flap"], "default": CHAINS["default"]}, (0.5,), tmp_path, fresh)
    assert sorted(path.name for path in (docs / "arena").glob("claims-*")) == sorted(
        f"claims-{way}tiny-4-{seed}.json" for way in ("", "fresh1-") for seed in SEEDS
    )
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    before, group = made.groups(docs)
    assert (before.title, group.title, group.fresh) == ("tiny", "tiny, fresh windows 1", 1)
    assert {line.name for line in group.lines[0.5]} == {"flap", "default"}
    page, _ = made.pages(docs)
    assert "| tiny, fresh windows 1 | 50 |" in page
    assert "| tiny | 50 |" in page
    with pytest.raises(SystemExit, match=r"^windows: expected one of the \d+ sets of 4 "):
        arena.run(model, SEEDS, {"flap": CHAINS["flap"]}, (0.5,), tmp_path, fresh._replace(fresh=99))


@pytest.mark.parametrize("words", ["fresh", "fresh:0", "fresh:x", "drawn:1"])
def test_windows_refuse_other_words(words):
    assert [arena.fresh_of("drawn"), arena.fresh_of("fresh:12")] == [0, 12]
    with pytest.raises(arena.argparse.ArgumentTypeError, match="expected drawn or fresh:N"):
        arena.fresh_of(words)


def test_figures_are_those_of_the_formulas(setting, model):
    """By numpy, of a model without its last layer's MLP; of the unpruned one nothing differs."""
    dense, words, subject = load_model(model), load_tokenizer(model), arena.open_subject(arena.ModelConfig(name=model))
    texts = {name: arena.text_of(source, words, setting) for name, source in setting.texts.items()}
    judge = arena.Judge(subject, texts, setting.first)
    keep = {name: units.copy() for name, units in subject.existing.items()}
    keep["mlp"][-1] = False
    found = judge.judged(subject, keep, {"Penn Treebank": -np.inf})
    pruned = arena.LlamaSubject(dense).cut(keep).model
    for name, text in texts.items():
        tokens = text.windows.tokens[: setting.first]
        known, own = (np.stack([reference(each, row)[0] for row in tokens])[:, :-1] for each in (dense, pruned))
        known, own = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (known, own))
        losses = -np.take_along_axis(own, tokens[:, 1:, None], -1)[..., 0].mean(1)
        np.testing.assert_allclose(found["losses"][name][: setting.first], losses, atol=2e-4)
        assert found["kl"][name] == pytest.approx((np.exp(known) * (known - own)).sum(-1).mean(), abs=2e-4)
        assert found["changed"][name] == pytest.approx((known.argmax(-1) != own.argmax(-1)).mean(), abs=1e-3)
        whole = judge.judged(subject, subject.existing, {})
        assert whole["kl"][name] == whole["changed"][name] == 0
        everything = window_losses(dense, arena.pairs(text.windows, 4)).means
        np.testing.assert_allclose(whole["losses"][name], everything, atol=1e-4)
    assert [len(found["losses"][name]) for name in texts] == [12, 4], "one is far above the lowest"


def test_windows_are_read_in_a_random_order_that_is_always_the_same(setting, model):
    words = load_tokenizer(model)
    once, again = (arena.text_of(setting.texts["WikiText-2"], words, setting) for _ in range(2))
    np.testing.assert_array_equal(once.windows.tokens, again.windows.tokens)
    assert once.articles == again.articles
    assert once.articles != sorted(once.articles)
    other = arena.text_of(setting.texts["WikiText-2"], words, setting._replace(drawn=36))
    assert not np.array_equal(other.windows.tokens, once.windows.tokens)


def test_a_row_that_another_process_adds_meanwhile_stays(setting, model, tmp_path, monkeypatch):
    def meanwhile(self, *_):
        found = json.loads(self.path.read_text())
        self.path.write_text(json.dumps(found | {"rows": {**found["rows"], "theirs@0.2": {"key": "theirs"}}}))
        return {"failed": "for the test"}

    monkeypatch.setattr(arena.Arena, "_row", meanwhile)
    arena.run(model, [3], {"ours": "magnitude > uniform"}, (0.2,), tmp_path, setting._replace(docs=tmp_path))
    assert [*files(tmp_path)[0]["rows"]] == ["theirs@0.2", "ours@0.2"]


@pytest.fixture
def written(ran, tmp_path, monkeypatch):
    """A page and a README of these files, and where they are."""
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{made.BEGIN}\nold\n{made.END}\n\nmore\n")
    made.report(ran, readme)
    return ran, readme


@pytest.mark.slow
def test_the_page_says_what_the_files_say(written):
    docs, readme = written
    assert made.differing(docs, readme) == []
    assert readme.read_text().startswith("# A\n")
    assert readme.read_text().endswith(f"{made.END}\n\nmore\n")
    page = (docs / "arena.md").read_text()
    assert all((docs / "arena" / f"{name}.svg").stat().st_size > 1000 for name in ("front", "steps"))
    losses = np.array([each["rows"]["flap@0.5"]["losses"]["WikiText-2"] for each in files(docs)])
    table = page[page.index("| method |") :].partition("\n\n")[0]
    head, _, *lines = [line.split(" | ") for line in table.split("\n")]
    assert len(lines) == 6, "unpruned; default at 20 %, without and with LoRA; three at 50 %"
    (flap,) = [cells for cells in lines if "flap" in cells[0]]
    figure = re.fullmatch(r"<details><summary>([\d.]+)</summary>from default: (.+)</details>", flap[3])
    assert figure is not None
    assert (head[3], figure[1]) == ("WikiText-2", f"{np.exp(losses.mean()):.1f}")
    assert re.match(r"[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\), .*; on \d+ windows, 2 seeds$", figure[2])
    assert len([cells for cells in lines if "<b>default + LoRA</b>" in cells[0]]) == 1
    assert page.index("<details>") > page.index("front.svg") > page.index("Lowest: "), "answer, figure, table"
    assert "| repair: `least_squares` |" in page
    assert "- `nothing@0.5` could not be pruned: " in page
    unpruned = (
        r"\| ~?[\d.]+ \| ~?[\d.]+ \| 0.00 \| <details><summary>[\d.]+ ± [\d.]+</summary>1 seed, 4 items .*? \| 100 \|"
    )
    assert re.search(unpruned, page), "with tasks"
    assert "\n- `fast`\n" in page[page.index("Not run:") :]
    assert len(readme.read_text().split(made.BEGIN)[1].split("\n")) <= 16
    for path in (docs / "arena.md", readme):  # control: any digit of a table or sentence of the arena
        whole = path.read_text()
        part = whole if path.suffix == ".md" and path.name != "README.md" else whole[whole.index(made.BEGIN) :]
        places = [found.start() + len(whole) - len(part) for found in re.finditer(r"\d+\.\d", part)]
        for place in places[:: len(places) // 2]:
            path.write_text(f"{whole[:place]}{(int(whole[place]) + 1) % 10}{whole[place + 1 :]}")
            assert made.differing(docs, readme), whole[place - 30 : place + 10]
        path.write_text(whole)
    assert made.differing(docs, readme) == []


@pytest.mark.slow
def test_rows_of_few_seeds_are_told_apart(ran, monkeypatch):
    losses = np.array([each["rows"]["flap@0.5"]["losses"]["WikiText-2"] for each in files(ran)])
    for fewest, there in ((2, False), (3, True)):
        monkeypatch.setattr(made, "FEWEST_SEEDS", fewest)
        said = made.on_few_seeds(made.read_group(ran, "tiny", 4, made.rows()))
        assert (f"`flap` {np.exp(losses.mean()):.1f} / " in "".join(said)) == there
        assert ("(3 and 4)" in "".join(said)) == there
    assert made.pages(ran) is None, "no row has enough seeds"


@pytest.mark.slow
def test_training_and_more_text_are_answered_apart(ran, monkeypatch):
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group, lowest = made.read_group(ran, "tiny", 4, made.rows()), "Lowest: `flap` in 2 of 2 comparisons."
    both = [
        line._replace(found={s: row | {"after": row} for s, row in line.found.items()}) for line in group.lines[0.5]
    ]
    trained = group._replace(lines=group.lines | {0.5: both})
    more = group._replace(examples=8)
    for found, which in (([group], []), ([group, more], ["Calibrated on 8 windows, tiny. "]),
                         ([trained], ["After LoRA, tiny. "])):  # fmt: skip
        said = [each for each in made.answer(found).values() if "Lowest" in each]
        assert [each.partition("Lowest")[0] for each in said] == ["", *which], (
            "where something published stands beside ours"
        )
        assert all(lowest in each for each in said)


@pytest.mark.slow
def test_what_training_changes_is_beside_the_same_row(ran, monkeypatch):
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group = made.read_group(ran, "tiny", 4, made.rows())
    flap, by = group.named(0.5, "flap"), math.log(1.25)
    after = {s: {"losses": {t: [loss - by for loss in each] for t, each in row["losses"].items()}}
             for s, row in flap.found.items()}  # fmt: skip
    lines = [flap._replace(found={s: row | {"after": after[s]} for s, row in flap.found.items()})]
    (row,) = [each for each in made.by_training(group._replace(lines={0.5: lines})) if each.startswith("| flap")]
    assert row.count("| -20.0 (-20.0 to -20.0), significantly lower") == len(group.dense)
    assert made.by_training(group._replace(lines={0.5: [flap]})) == [], "not trained"


@pytest.mark.slow
def test_groupwise_recovery_stands_beside_the_row(ran, monkeypatch):
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group = made.read_group(ran, "tiny", 4, made.rows())
    before, after = (np.array([losses_of(each, slot) for each in files(ran)]) for slot in ("", made.GROUPWISE))
    assert (after != before).all(), "control"
    said = made.by_training(group, made.GROUPWISE)
    row = r"\| saap-in-groups \| ~?[\d.]+ \| ~?[\d.]+ \| [+-]"
    (figures,) = [line.split(" | ") for line in said if re.match(row, line)]
    change = 100 * np.expm1((after - before).mean())
    assert figures[3].startswith(f"{change:+.1f} (")
    assert [line for line in said if re.match(r"\| saap-in-groups \| [\d.]+ ± [\d.]+ \| [\d.]+ ± ", line)]
    assert not [line for line in made.by_training(group) if "saap-in-groups" in line], "control: not by LoRA"
    assert "## What the recovery of SAAP's paper changes" in made.pages(ran)[0]


def losses_of(found: dict, slot: str) -> list[float]:
    """Read the losses of the row of groups, as pruned or after a recovery."""
    row = found["rows"]["saap-in-groups@0.2"]
    return (row[slot] if slot else row)["losses"]["WikiText-2"]


@pytest.mark.slow
def test_our_repair_stands_beside_the_published_one(ran, monkeypatch):
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group = made.read_group(ran, "tiny", 4, made.rows())
    flap = group.named(0.5, "flap")

    def lower(name: str, kind: str, by: float) -> made.Line:
        found = {s: row | {"losses": {t: [loss - by for loss in each] for t, each in row["losses"].items()}}
                 for s, row in flap.found.items()}  # fmt: skip
        return made.Line(name, kind, 0.5, found)

    three = [flap, lower("flap-our-repair", "mixed", math.log(1.25)), lower("default", "ours", math.log(2))]
    both = group._replace(lines={0.5: three})
    *_, row, _ = made.repaired(both)
    assert re.match(
        r"\| flap \| [\d.]+ \| -20\.0 .*, significantly lower; on \d+ windows, 2 seeds "
        r"\| -37\.5 .*, significantly lower; on \d+ windows, 2 seeds \| [\d.]+ \| -20\.0 ",
        row,
    )
    (said,) = [each for which, each in made.answer([both]).items() if which == "repair"]
    assert "after 1 published method it changes their perplexity by -20.0 % (significantly lower in 2 of 2)" in said
    assert "`default` is -37.5 % from the lowest of those so repaired" in said
    assert said.endswith("in 2 of 2 comparisons.")
    block = made.readme_block([both])
    assert "| -20.0 / -20.0 | -37.5 (-37.5 to -37.5) / -37.5 (-37.5 to -37.5) |" in block
    assert made.repaired(group._replace(lines={0.5: three[:2]})) == [], "without default"
    for found in ([both._replace(lines={0.5: [flap, three[2]]})], [both._replace(lines={0.5: three[:2]})]):
        assert "repair" not in made.answer(found), "nothing is said where rows are missing"
        assert "our repair" not in made.readme_block(found)


def crossed_of(value: float, p_value: float) -> made.Crossed:
    """Make an estimate of a p-value."""
    one = made.Crossed(value, (1.0, 1e-9), (4.0, 59.0), 128)
    return one._replace(variances=((abs(value) / stats.t.ppf(1 - p_value / 2, 4)) ** 2, 1e-12))


@pytest.mark.slow
def test_each_interim_analysis_takes_its_part(ran, monkeypatch):
    monkeypatch.setattr(made, "FEWEST_SEEDS", 1)
    one = made.Comparison(made.read_group(ran, "tiny", 4, made.rows()), 0.5, "WikiText-2")
    for p_value, plain, shared in ((0.02, True, True), (0.03, True, False), (0.06, False, False)):  # two seeds
        monkeypatch.setattr(made.Group, "beside", lambda *_, p=p_value: crossed_of(-1.0, p))
        for interim, significant in ((False, plain), (True, shared)):
            assert ("default" in one.below("ours", "published", interim)) == significant
    group, default = one.group, one.group.named(0.5, "default")
    rivals = [line._replace(found={"3": line.found["3"]}) for line in group.of(0.5, "published")]
    alone = one._replace(group=group._replace(lines={0.5: [default, *rivals]}))
    monkeypatch.setattr(made.Group, "beside", lambda *_: crossed_of(-1.0, 0.03))
    assert alone.below("ours", "published") == ["default"], "a seed that no rival has is no other analysis"
    monkeypatch.setattr(made.Group, "beside", lambda *_: crossed_of(1.0, 1e-4))
    assert one.below("ours", "published") == [], "above"


@pytest.mark.slow
def test_another_bad_rival_does_not_weaken_a_claim(ran, monkeypatch):
    """Of six rivals, each with p = 0.03: below each of them, though Holm would find none; not where one has 0.06."""
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group = made.read_group(ran, "tiny", 4, made.rows())
    flap, default = group.named(0.5, "flap"), group.named(0.5, "default")
    rivals = [flap._replace(name=f"rival {each}") for each in range(6)]
    one = made.Comparison(group._replace(lines={0.5: [default, *rivals]}), 0.5, "WikiText-2")
    for last, expected in ((0.03, ["default"]), (0.06, [])):
        at = {each.name: 0.03 for each in rivals} | {"rival 5": last}
        monkeypatch.setattr(made.Group, "beside", lambda self, a, b, text, at=at: crossed_of(-1.0, at[b.name]))
        assert one.below("ours", "published") == expected
        assert not any(each.significant for each in one.group.against(default, rivals, "WikiText-2").values())


@pytest.mark.slow
def test_default_stands_in_for_missing_windows(ran, monkeypatch):
    """By hand: a row of the first windows alone, and of one seed, is as far from `default` on all as on its own."""
    monkeypatch.setattr(made, "FEWEST_SEEDS", 2)
    group, text = made.read_group(ran, "tiny", 4, made.rows()), "WikiText-2"
    flap, default = group.named(0.5, "flap"), group.named(0.5, "default")
    harder = {s: row | {"losses": {text: [*row["losses"][text][:4], *(9.0 for _ in range(8))]}}
              for s, row in default.found.items()}  # fmt: skip
    harder["4"] = harder["4"] | {"losses": {text: [loss + 1 for loss in harder["4"]["losses"][text]]}}
    few = flap._replace(found={"3": {"losses": {text: [loss + 0.5 for loss in harder["3"]["losses"][text][:4]]}}})
    default = default._replace(found=harder)
    group = group._replace(lines={0.5: [default, few]})
    whole = np.mean([row["losses"][text] for row in harder.values()])
    assert group.log_perplexity(default, text) == pytest.approx(whole)
    assert group.log_perplexity(few, text) == pytest.approx(whole + 0.5)
    assert group.perplexity(few, text).startswith("~")
    assert group.seeds_of(few) == "1 of 2 seeds"
    alone = group._replace(lines={0.5: [few]})
    dense = group.dense[text]
    own = dense.mean() + np.mean(few.found["3"]["losses"][text] - dense[:4])
    assert alone.control(few) is None
    assert alone.log_perplexity(few, text) == pytest.approx(own), "by the unpruned model, where there is no default"
    apart = few._replace(found={"5": few.found["3"]})
    assert group.control(apart) is None, "nor a seed of both"


@pytest.mark.slow
def test_rows_are_ordered_by_how_far_they_are_from_default(ran, monkeypatch):
    """A row of the easier seed alone has the lower mean, and stands behind one that is nearer `default` on both."""
    monkeypatch.setattr(made, "FEWEST_SEEDS", 1)
    group = made.read_group(ran, "tiny", 4, made.rows())

    def row(name: str, **above: float) -> made.Line:
        found = {s: {"losses": dict.fromkeys(group.dense, [{"3": 1.0, "4": 3.0}[s[1:]] + by] * 12)}
                 for s, by in above.items()}  # fmt: skip
        return made.Line(name, "published", 0.5, {seed[1:]: each for seed, each in found.items()})

    default, near, easy = row("default", _3=0, _4=0), row("near", _3=0.1, _4=0.1), row("easy", _3=0.2)
    group = group._replace(lines={0.5: [default._replace(kind="ours"), easy, near]})
    assert [line.name for line in group.of(0.5, "ours", "published")] == ["default", "near", "easy"]
    assert group.lowest(group.of(0.5, "published"), "WikiText-2").name == "near"


@pytest.mark.slow
def test_the_page_says_which_published_rows_ran(written):
    docs, readme = written
    page = (docs / "arena.md").read_text()
    (row,) = re.findall(r"\| tiny, 4 windows \| 50 \| (.*) \|", page)
    ran, few, missing = row.split(" | ")
    assert (ran, few) == ("2", "–")
    assert "`wanda-sp`" in missing
    assert "`flap`" not in missing
    assert page.count(made.NOTES["saap"]) == 1
    assert made.READING in page
    assert made.READING in readme.read_text()


def test_readme_and_page_are_those_of_the_files():
    if made.pages() is None:
        pytest.skip("there are no files of the new table yet")
    assert made.differing(PROJECT / "docs", README) == [], "run experiments/arena.py report"


def test_there_is_a_place_in_the_readme_and_a_row_for_each_recipe():
    assert made.END in README.read_text().partition(made.BEGIN)[2]
    known = made.rows()
    assert {name for name, each in known.items() if each.kind in ("ours", "published")} >= {"default", "saap", "flap"}
    assert known["default"].kind == "ours"
    for name, (of, *_) in made.FEWER.items():
        assert known[name].chain != made.RECIPES[of].chain, "what is replaced is there"
        arena.Chain(arena.expand([known[name].chain])[0].steps, name)
    assert known["saap"].kind == "published"
    names, parts = [*known], [name for name, each in known.items() if each.kind == "part"]
    assert parts, "control"
    for name in parts:
        assert names.index(name) < names.index(name.partition("[")[0]), "what goes on from it comes behind it"
