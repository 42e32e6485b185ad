"""Shell completion of commands, settings and group files for bash, zsh and fish, from the registry."""

from __future__ import annotations

from spinal_jax.cli import help as pages
from spinal_jax.cli.registry import COMMANDS, Command
from spinal_jax.errors import UserError

SHELLS = ("bash", "zsh", "fish")

BASH = """# eval "$(spinal completion bash)"
_spinal() {{
    local word="${{COMP_LINE:0:COMP_POINT}}" words
    word="${{word##* }}"
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{commands}" ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -- "${{word#*=}}"))
    [[ "$word" == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%%=*}}="}}")
    [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace
}}
complete -o filenames -F _spinal spinal"""

FISH = """# spinal completion fish | source
complete -c spinal -n __fish_use_subcommand -f -a "{commands}"
{cases}"""


def script(shell: str) -> str:
    """The completion script of a shell. Raises UserError for an unknown shell."""
    if shell not in SHELLS:
        raise UserError(f"there is no completion for {shell!r}; there is one for {', '.join(SHELLS)}")
    commands = " ".join(COMMANDS)
    if shell == "fish":
        lines = [
            f'complete -c spinal -n "__fish_seen_subcommand_from {command.name}" -a "{" ".join(words(command))}"'
            for command in COMMANDS.values()
        ]
        return FISH.format(commands=commands, cases="\n".join(lines))
    cases = [f'        {command.name}) words="{" ".join(words(command))}" ;;' for command in COMMANDS.values()]
    text = BASH.format(commands=commands, cases="\n".join(cases))
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text.replace('bash)', 'zsh)')}"


def words(command: Command) -> list[str]:
    """Completions of a command: settings, settings with their choices, and group files."""
    found = ["--help"]
    for setting in pages.settings(command):
        found += [f"{setting.name}={choice}" for choice in setting.choices if " " not in str(choice)]
        found += [f"{setting.name}="] if not setting.choices else []
    for part, folder in command.folders.items():
        found += [f"{part}={file}" for file in pages.group_files(folder)]
    return found
