"""Completion in a shell: every command, every option that its parser takes, in the shell itself where it is here."""

import shutil
import subprocess

import pytest

from saap_jax.cli import main
from saap_jax.cli.completion import SHELLS, completions
from saap_jax.config.packaged import packaged
from saap_jax.recipes import recipes


def completed(tmp_path, *words: str) -> list[str]:
    """Return what bash offers after some words, of which the last is begun."""
    script = tmp_path / "saap.bash"
    if not script.exists():
        script.write_text(SHELLS["bash"](completions([*main.COMMANDS, "help"])))
    asked = 'source "$0"; COMP_WORDS=(saap "$@"); COMP_CWORD=$#; _saap; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", asked, script, *words], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_bash_offers_what_there_is(tmp_path):
    assert completed(tmp_path, "co") == ["compare", "completion"]
    assert set(main.COMMANDS) < {*completed(tmp_path, "")}
    assert completed(tmp_path, "prune", "--rat") == ["--ratio"]
    assert {"--search.allocation", "--search.depth"} < {*completed(tmp_path, "compare", "quickstart", "--search.")}
    assert "quickstart" in completed(tmp_path, "compare", "q")
    assert "fidelity" not in completed(tmp_path, "compare", ""), "a configuration of another command"
    assert completed(tmp_path, "recipes", "fla") == ["flap"]
    assert completed(tmp_path, "nothing", "") == []


def test_every_option_is_one_that_the_command_takes(capsys):
    words = completions([*main.COMMANDS, "help"])
    assert {*packaged()} == {word for each in words.values() for word in each if word in packaged()}
    assert {*recipes()} < {*words["recipes"]}
    for command in ("compare", "prune", "ab", "plan"):
        with pytest.raises(SystemExit, match="0"):
            main.main([command, "--help-all"])
        said = capsys.readouterr().out
        options = [word for word in words[command] if word.startswith("--") and "distributed" not in word]
        missing = [word for word in options if word not in said and word != "--help-all"]
        assert not missing, (command, missing)


@pytest.mark.parametrize("shell", [*SHELLS])
def test_each_shell_reads_it(shell, tmp_path, capsys):
    assert main.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    assert "compare" in script.read_text()
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True)


def test_bad_words_are_one_line(capsys):
    for words in ([], ["tcsh"], ["bash", "zsh"]):
        assert main.main(["completion", *words]) == 2
        assert "expected one of bash, zsh, fish" in capsys.readouterr().err
    assert main.main(["completion", "--help"]) == 0
    assert "~/.bashrc" in capsys.readouterr().out
