"""Shell completion: what bash offers, and that every script has every command and option."""

import shlex
import subprocess

import pytest

from qwenedit.cli.completion import SHELLS
from qwenedit.cli.options import _parser, main
from qwenedit.switches import NAMES

COMMANDS = next(action.choices for action in _parser()._actions if isinstance(action.choices, dict))


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("bash") / "qwenedit"
    path.write_text(SHELLS["bash"](COMMANDS) + "\n")
    return path


def offered(script, *words):
    """What bash offers for the last word, by the function that completes the command there."""
    typed = " ".join(shlex.quote(word) for word in ("qwenedit", *words))
    lines = f"""
        set -u
        source {shlex.quote(str(script))}
        read -r -a registered <<< "$(complete -p qwenedit)"
        COMP_WORDS=({typed}); COMP_CWORD={len(words)}; COMPREPLY=()
        "${{registered[-2]}}"
        printf '%s\\n' "${{registered[*]}}" ${{COMPREPLY[@]+"${{COMPREPLY[@]}}"}}
    """
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    registered, *found = done.stdout.splitlines()
    assert (
        registered == "complete -o default -F _qwenedit qwenedit"
    )  # names of files, where nothing is offered
    return found


def test_bash_completes_commands_options_and_values(script):
    assert offered(script, "") == list(COMMANDS)
    assert offered(script, "ge") == ["generate"]
    assert offered(script, "edit", "--sam") == ["--sampler"]
    assert offered(script, "edit", "a.png", "a prompt", "--control-s") == [
        "--control-scale",
        "--control-start",
    ]
    assert offered(script, "edit", "--sampler", "h") == ["heun"]
    assert offered(script, "edit", "a.png", "x", "-o", "b.png", "--residency", "st") == ["stage", "stream"]
    assert offered(script, "batch", "--layout", "") == ["gedit", "imgedit", "redbench"]
    assert offered(script, "edit", "--switch", "") == list(NAMES)
    assert offered(script, "edit", "--switch", "guidance.n") == ["guidance.norm"]
    assert offered(script, "completion", "f") == ["fish"]
    ten = ["x"] * 9
    assert offered(script, "edit", *ten, "--sam") == ["--sampler"]


def test_where_nothing_is_known_bash_completes_files(script):
    for words in (
        ("edit", "a"),
        ("edit", "-o", "b"),
        ("ablate", ""),
        ("parity", "--sampler", "h"),
        ("no", "-"),
    ):
        assert offered(script, *words) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_every_script(shell, capsys):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    words = set(printed.out.replace('"', " ").replace("'", " ").split())
    for name, command in COMMANDS.items():
        assert name in words
        for action in command._actions:
            for flag in action.option_strings:
                assert (flag if shell != "fish" else flag.lstrip("-")) in words, (name, flag)
            assert {str(value) for value in action.choices or ()} <= words


def test_the_scripts_are_whole(script):
    assert subprocess.run(["bash", "-n", str(script)], timeout=60).returncode == 0
    for line in SHELLS["fish"](COMMANDS).splitlines():
        assert shlex.split(line)[:3] == ["complete", "-c", "qwenedit"]
    zsh = SHELLS["zsh"](COMMANDS)
    assert zsh.endswith(SHELLS["bash"](COMMANDS)) and "bashcompinit" in zsh


def test_another_shell_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["completion", "tcsh"])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "argument shell: invalid choice: 'tcsh'" in line
