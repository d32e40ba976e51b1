import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from saap_jax.data.sources import join_texts, read_texts
from saap_jax.data.windows import (
    Scenario,
    Windows,
    beginning,
    calibration_windows,
    consecutive_windows,
    evaluation_windows,
    load_scenarios,
    pairs,
    random_windows,
    stratified_windows,
    tokenize,
    window_articles,
)

sizes = {"examples": st.integers(1, 12), "length": st.integers(2, 9), "seed": st.integers(0, 2**64 - 1)}


def stream(size: int) -> np.ndarray:
    """Tokens that tell their own position."""
    return np.arange(size, dtype=np.int32)


@given(spare=st.integers(0, 40), **sizes)
def test_random_windows_share_no_position(spare, examples, length, seed):
    windows = random_windows(stream(examples * length + spare), examples, length, seed)
    assert windows.shape == (examples, length)
    assert (np.diff(windows, axis=1) == 1).all()
    assert np.unique(windows).size == windows.size
    assert windows.min() >= 0
    assert windows.max() < examples * length + spare


def test_seeds_draw_different_windows_from_the_whole_stream():
    draws = [random_windows(stream(1000), 4, 10, seed) for seed in range(200)]
    assert len({draw.tobytes() for draw in draws}) == 200
    assert len({int(draw[0, 0]) % 10 for draw in draws}) == 10
    assert np.unique(draws).size > 990


@given(spare=st.integers(0, 40), **sizes)
def test_each_stretch_of_the_text_has_one_window(spare, examples, length, seed):
    size = examples * length + spare
    once, again = (stratified_windows(stream(size), examples, length, seed) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (np.diff(once, axis=1) == 1).all()
    assert np.unique(once).size == once.size
    for number, window in enumerate(once):  # each window whole within its own stretch
        assert number * size // examples <= window[0]
        assert window[-1] < (number + 1) * size // examples


def test_seeds_draw_other_windows_of_the_stretches():
    draws = [stratified_windows(stream(1000), 4, 10, seed) for seed in range(200)]
    assert len({draw.tobytes() for draw in draws}) > 195
    assert np.unique(draws).size > 990
    with pytest.raises(ValueError, match="^expected at least 40 tokens for 4 x 10, got 39; ask for less"):
        stratified_windows(stream(39), 4, 10, 0)


def test_drawn_windows_meet_all_articles_in_proportion(tokenizer, tmp_path):
    """Of a WikiText file; the first windows, as they are without a seed, meet the first articles alone."""
    lengths, words = (300, 900, 500, 100, 600), "abcde"
    articles = zip(words, lengths, strict=True)
    rows = [row for word, many in articles for row in (f" = {word} = ", f" {word}" * many + " ")]
    file = tmp_path / "wiki.test.raw"
    file.write_text("".join(f" \n{row}\n" for row in rows))
    source, count = f"wikitext:{file}", 48

    def of_articles(**how) -> np.ndarray:
        texts = [tokenizer.decode(row) for row in evaluation_windows(source, tokenizer, 9, count, **how).tokens]
        return np.array([sum(text.count(word) for text in texts) for word in words]) / sum(map(len, texts))

    all_of = evaluation_windows(source, tokenizer, 9)
    whole = "".join(tokenizer.decode(row) for row in all_of.tokens)
    shares = np.array([whole.count(word) for word in words]) / len(whole)
    np.testing.assert_allclose(of_articles(drawn=0), shares, atol=1 / count)
    assert np.abs(of_articles() - shares).max() > 4 / count, "control"
    for cut in (evaluation_windows, window_articles):
        with pytest.raises(ValueError, match=f"^data source '{source}': expected at least .* for 9000 x 8, got "):
            cut(source, tokenizer, 9, 9000, drawn=0, bos="always")
    for how in ({}, {"drawn": 0}, {"drawn": 0, "bos": "always"}):
        rows = evaluation_windows(source, tokenizer, 9, count, **how).tokens
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        each = zip(texts, window_articles(source, tokenizer, 9, count, **how), strict=True)
        pure = [(text, article) for text, article in each if sum(word in text for word in words) == 1]
        assert len(pure) > count / 2
        assert all(words[article - 1] in text for text, article in pure)
    named = window_articles("builtin:descriptions", tokenizer, 64, 12)
    assert named == sorted(named)
    assert len({*named}) > 1
    assert window_articles(f"ptb:{file}", tokenizer, 9) == [], "one document"


@given(tokens=st.integers(0, 50), limit=st.none() | st.integers(1, 8), length=st.integers(2, 9))
def test_consecutive_windows_are_the_stream_without_its_tail(tokens, limit, length):
    if tokens < length:
        with pytest.raises(ValueError, match=f"expected at least {length} tokens for 1 x {length}, got {tokens};"):
            consecutive_windows(stream(tokens), length, limit)
        return
    windows = consecutive_windows(stream(tokens), length, limit)
    np.testing.assert_array_equal(windows.ravel(), stream(windows.size))
    assert len(windows) == min(tokens // length, limit or tokens)


@given(count=st.integers(1, 20), length=st.integers(2, 5), batch_size=st.integers(1, 7))
def test_batches_have_one_shape_and_lose_nothing(count, length, batch_size):
    tokens = stream(count * length).reshape(count, length) + 1
    windows = Windows(tokens, tokens % 5 != 0)
    parts = pairs(windows, batch_size)
    assert {each.shape for part in parts for each in part} == {(min(batch_size, count), length)}
    for rows, expected in zip(zip(*parts, strict=True), windows, strict=True):
        np.testing.assert_array_equal(np.concatenate(rows)[:count], expected)
        assert not np.concatenate(rows)[count:].any()


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ValueError, match=f"expected batch_size >= 1, got {size}"):
        pairs(Windows(np.zeros((1, 2), np.int32), np.ones((1, 2), bool)), size)
    for cut in (lambda: random_windows(stream(9), size, 2, 0), lambda: consecutive_windows(stream(9), 2, size),
                lambda: consecutive_windows(stream(9), 1)):  # fmt: skip
        with pytest.raises(ValueError, match="expected 1 window or more of 2 tokens of text or more, got"):
            cut()


def test_special_tokens_are_neither_added_nor_read_out_of_the_text(tokenizer):
    text = "the <unk> sat on <|endoftext|>, the <unk> too, longer than the model's context"
    tokens = tokenize(text, tokenizer)
    assert tokens.dtype == np.int32
    assert not np.isin(tokens, tokenizer.all_special_ids).any()
    assert tokenizer.decode(tokens) == text
    assert np.isin(tokenizer(text, verbose=False)["input_ids"], tokenizer.all_special_ids).sum() == 3


def test_a_tokenizer_that_reads_special_tokens_is_refused(tokenizer):
    class Careless:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def __call__(self, text, split_special_tokens, **options):
            return tokenizer(text, **options)

    assert tokenize("the cat", Careless()).size == tokenize("the cat", tokenizer).size
    with pytest.raises(ValueError, match="expected '<unk>' in the text to be spelled out, got the special token 1;"):
        tokenize("the <unk> cat", Careless())


def test_windows_are_those_of_the_joined_text(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "the cat sat on the mat"}\n{"text": "the dog sat on the log"}\n')
    tokens = tokenize("the cat sat on the mat\n\nthe dog sat on the log", tokenizer)
    windows = evaluation_windows(str(file), tokenizer, 4)
    np.testing.assert_array_equal(windows.tokens.ravel(), tokens[: windows.tokens.size])
    assert tokens.size - windows.tokens.size < 4
    assert windows.mask.all()
    assert windows.mask.shape == windows.tokens.shape
    drawn = calibration_windows(str(file), tokenizer, 2, 4, seed=3)
    np.testing.assert_array_equal(drawn.tokens, random_windows(tokens, 2, 4, 3))
    assert drawn.mask.all()


def beginner(tokenizer, adds: bool):
    """Return a copy of a tokenizer whose beginning of text it puts in front of every text or does not."""
    own = copy.deepcopy(tokenizer)
    if adds:
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{own.bos_token} $A", special_tokens=[(own.bos_token, own.bos_token_id)]
        )
    return own


@pytest.mark.parametrize(
    ("adds", "bos", "begins"),
    [(False, "auto", False), (False, "always", True), (True, "auto", True), (True, "never", False)],
)
def test_windows_begin_as_the_tokenizer_has_it_or_as_asked(tokenizer, tmp_path, adds, bos, begins):
    """The beginning takes the place of the last token of text of each window."""
    file, own = tmp_path / "a.txt", beginner(tokenizer, adds)
    file.write_text("the cat sat on the mat, the dog sat on the log")
    tokens = tokenize(file.read_text(), own)
    assert not np.isin(tokens, own.bos_token_id).any()
    read = evaluation_windows(str(file), own, 5, bos=bos)
    drawn = calibration_windows(str(file), own, 2, 5, seed=3, bos=bos)
    spread = evaluation_windows(str(file), own, 5, 2, bos=bos, drawn=3)
    rest = 5 - begins
    some = [draw(tokens, 2, rest, 3) for draw in (random_windows, stratified_windows)]
    for windows, text in zip((read, drawn, spread), (consecutive_windows(tokens, rest), *some), strict=True):
        assert windows.tokens.shape == windows.mask.shape == (len(text), 5)
        assert windows.mask.all()
        np.testing.assert_array_equal(windows.tokens[:, begins:], text)
        assert not begins or (windows.tokens[:, 0] == own.bos_token_id).all()


def test_no_window_begins_with_a_token_that_a_tokenizer_lacks(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.bos_token = None
    assert beginning(own) == []
    with pytest.raises(ValueError, match="bos: expected a tokenizer with a token for the beginning of text"):
        beginning(own, "always")


def test_builtin_windows_come_from_their_own_part(tokenizer):
    calibration = join_texts(read_texts("builtin:reference", "calibration"))
    evaluation = join_texts(read_texts("builtin:reference", "evaluation"))
    drawn = [tokenizer.decode(row) for row in calibration_windows("builtin:reference", tokenizer, 8, 256, 0).tokens]
    assert all(text in calibration and text not in evaluation for text in drawn)
    first = evaluation_windows("builtin:reference", tokenizer, 256, limit=1)
    assert evaluation.startswith(tokenizer.decode(first.tokens[0]))


# --- scenarios -----------------------------------------------------------------------------------

REFERENCE = Scenario("reference", "builtin:reference")
DESCRIPTIONS = Scenario("descriptions", "builtin:descriptions")


def test_each_scenario_has_its_own_windows_whatever_else_is_loaded(tokenizer):
    both = load_scenarios([REFERENCE, DESCRIPTIONS], tokenizer, 3, 16, seed=5)
    alone = load_scenarios([DESCRIPTIONS], tokenizer, 3, 16, seed=5)
    assert list(both) == ["reference", "descriptions"]
    np.testing.assert_array_equal(both["descriptions"].tokens, alone["descriptions"].tokens)
    expected = calibration_windows(DESCRIPTIONS.source, tokenizer, 3, 16, seed=5)
    np.testing.assert_array_equal(alone["descriptions"].tokens, expected.tokens)
    renamed = load_scenarios([Scenario("other", DESCRIPTIONS.source)], tokenizer, 3, 16, seed=5)
    reseeded = load_scenarios([DESCRIPTIONS], tokenizer, 3, 16, seed=6)
    np.testing.assert_array_equal(renamed["other"].tokens, alone["descriptions"].tokens)
    assert not np.array_equal(both["reference"].tokens, alone["descriptions"].tokens)
    assert not np.array_equal(reseeded["descriptions"].tokens, alone["descriptions"].tokens)


def test_scenarios_that_come_twice_are_refused(tokenizer):
    with pytest.raises(ValueError, match="expected each name once, got 'reference' twice"):
        load_scenarios([REFERENCE, Scenario("reference", "builtin:descriptions")], tokenizer, 1, 8, 0)
    with pytest.raises(ValueError, match="expected each source once, got 'builtin:reference' twice"):
        load_scenarios([REFERENCE, Scenario("again", "builtin:reference")], tokenizer, 1, 8, 0)
    with pytest.raises(ValueError, match="expected at least one, got none"):
        load_scenarios([], tokenizer, 1, 8, 0)
