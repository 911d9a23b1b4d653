"""Checks the commands that README and docs show: each `plora-…` line must parse, each `make` target exist, each link lead somewhere.
A TOML file that is shown under its name is there when they are parsed.

`make demo` and `make test`, the two that a newcomer runs, are run by .ci/run itself.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^`([\w.-]+\.toml)`:\n\n```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#\s]+)")
TARGET = re.compile(r"^([a-z][\w-]*):", re.MULTILINE)


def commands() -> dict[str, click.Command]:
    from plora.cloud_server.cli import main as cloud
    from plora.device_runtime.cli import main as device
    from plora.export.cli import main as export
    from plora.models.tune_cli import main as tune
    from plora.planner.cli import main as plan

    return {"plora-plan": plan, "plora-tune": tune, "plora-export": export, "plora-cloud": cloud, "plora-device": device}


def parse(command: click.Command, name: str, words: list[str]) -> None:
    """Parses as the shell would have it, without running. Raises click.ClickException."""
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        return parse(command.commands[words[0]], words[0], words[1:])
    if isinstance(command, click.Group) and "export" in command.commands and words and not words[0].startswith("-"):
        return parse(command.commands["export"], "export", words)  # plora-export's default
    command.make_context(name, words)


def lines(block: str) -> list[str]:
    """Shell lines, continued ones joined, comments and prompts off."""
    joined = block.replace("\\\n", " ")
    return [line.removeprefix("$ ").strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def check(path: Path) -> tuple[int, list[str]]:
    """(commands seen, what is wrong) in one Markdown file."""
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT)
    wrong = [f"{where}: link to {link}, which is not there" for link in LINK.findall(text) if not (path.parent / link).exists()]
    for name, content in SHOWN.findall(text):
        Path(name).write_text(content, encoding="utf-8")
    known, targets, seen = commands(), set(TARGET.findall((ROOT / "Makefile").read_text())), 0
    for line in (line for block in FENCE.findall(text) for line in lines(block)):
        words = shlex.split(line, comments=True)
        words = [word for word in words if word not in ("&", "sudo")]
        tool = Path(words[0]).name if words else ""
        if tool == "make":
            seen += 1
            wrong += [f"{where}: make {word}: no such target" for word in words[1:] if "=" not in word and word not in targets]
        elif tool in known:
            seen += 1
            until = next((i for i, word in enumerate(words) if word in (">", "|", "2>", "&&")), len(words))
            try:
                parse(known[tool], tool, words[1:until])
            except click.exceptions.Exit:
                pass  # --help and --version end here
            except SystemExit:
                wrong.append(f"{where}: {line}: refused, see above")
            except click.ClickException as error:
                wrong.append(f"{where}: {line}: {error.format_message()}")
    return seen, wrong


def main() -> int:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "persona" / "README.md"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        results = [check(path) for path in files]
    wrong = [line for _, lines_wrong in results for line in lines_wrong]
    print("\n".join(wrong) or f"{sum(seen for seen, _ in results)} commands in {len(files)} files parse")
    return 1 if wrong or not sum(seen for seen, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
