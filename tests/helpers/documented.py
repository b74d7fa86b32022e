"""The commands that README and docs show, as a person would type them."""

from __future__ import annotations

import re
import shlex

from tests.helpers.tiny_run import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = (
    "python",
    "crl-exp",
    "make",
    "pip",
    "hf",
    "apt-get",
    "git",
    "scontrol",
    "squeue",
    "export",
)
FENCED = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
# A command kept in a variable of the shell, over several lines.
VARIABLE = re.compile(r'^\$ (?P<name>[A-Z]+)="(?P<command>[^"]*)"', re.M)


def documented() -> dict[str, str]:
    """Every command and the first page that has it. Those in `bash` blocks of docs/extending.md are
    run by tests/launcher/test_extending.py."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text()
        lines: list[str] = []
        for language, block in FENCED.findall(text):
            if language == "":
                lines += _typed(block)
        # Line ends within a sentence may lie within a command too.
        lines += [one for one in INLINE.findall(FENCED.sub("", text)) if " " in one.strip()]
        for line in lines:
            command = " ".join(line.split("  #")[0].split()).removeprefix("$ ")
            command = in_a_checkout(command)
            if command.split()[0] in PROGRAMS or command.startswith("$"):
                found.setdefault(command, page.name)
    return found


def in_a_checkout(command: str) -> str:
    """What is typed there in place of a command of the installed program."""
    program, *more = command.split(" ", 2)
    if program != "crl-exp":
        return command
    script = "python launch.py" if more[0] == "launch" else f"python -m crl_exp {more[0]}"
    return " ".join([script, *more[1:]])


def _typed(block: str) -> list[str]:
    block = block.replace("\\\n", "")
    for name, command in VARIABLE.findall(block):
        block = VARIABLE.sub(" ".join(("$", *command.split())), block, count=1)
        block = block.replace(f"${name}", " ".join(command.split()))
    return [line for line in block.splitlines() if line.strip()]


def words(command: str) -> list[str]:
    """As the shell splits it, without what may be left out ([--watch] is taken, … is not)."""
    return [word.strip("[]") if word.startswith("[-") else word
            for word in shlex.split(command) if word != "…"]  # fmt: skip
