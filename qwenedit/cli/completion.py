"""`qwenedit completion bash | zsh | fish`: a script that completes commands, options and their values.

It is made from the parser. Where it knows nothing, the shell completes names of files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from qwenedit.cli.arguments import Switch
from qwenedit.cli.process import say
from qwenedit.switches import NAMES

__all__ = ["SHELLS", "completion"]

BASH = r"""_qwenedit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
    case "$COMP_CWORD ${{COMP_WORDS[1]}} $before" in
        "1 "*) words="{commands}" ;;
{values}
        *) case "$word ${{COMP_WORDS[1]}}" in
{options}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _qwenedit qwenedit"""
ZSH = """(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""


def completion(options: argparse.Namespace) -> None:
    say(SHELLS[options.shell](options.commands))


def bash(commands: dict[str, argparse.ArgumentParser]) -> str:
    values, words = [], []
    for name, command in commands.items():
        of_command = list(_options(command))
        flags = " ".join(flag for action in of_command for flag in action.option_strings)
        words.append(f'            "-"*" {name}") words="{flags}" ;;')
        for action in of_command:
            if chosen := _values(action):
                patterns = "|".join(f'*" {name} {flag}"' for flag in action.option_strings)
                values.append(f'        {patterns}) words="{" ".join(chosen)}" ;;')
        for action in command._actions:
            if not action.option_strings and (chosen := _values(action)):
                values.append(f'        "2 {name} "*) words="{" ".join(chosen)}" ;;')
    return BASH.format(commands=" ".join(commands), values="\n".join(values), options="\n".join(words))


def zsh(commands: dict[str, argparse.ArgumentParser]) -> str:
    return ZSH + bash(commands)


def fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    first = "complete -c qwenedit -n __fish_use_subcommand -f -a"
    lines = [f"{first} {name}" for name in commands]
    for name, command in commands.items():
        of_command = f"complete -c qwenedit -n '__fish_seen_subcommand_from {name}'"
        for action in command._actions:
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in action.option_strings
            )
            chosen, takes = " ".join(_values(action)), action.nargs != 0
            value = f"-x -a '{chosen}'" if chosen else "-r" if takes and flags else ""
            if flags or chosen:
                lines.append(" ".join(part for part in (of_command, flags, value) if part))
    return "\n".join(lines)


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _options(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in command._actions if action.option_strings)


def _values(action: argparse.Action) -> list[str]:
    return list(NAMES) if isinstance(action, Switch) else [str(value) for value in action.choices or ()]
