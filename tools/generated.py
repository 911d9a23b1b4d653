"""Writes or checks what is generated from code: the protobuf modules, the state diagram, the CLI reference; and from results, the
tables of the quality study.

    python tools/generated.py [--check]

Run it in the root of the repository, where plora is installed with its `dev` extra. --check writes nothing, names each file
that is stale, and exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL_DOC = "docs/protocol.md"
CLI_DOC = "docs/cli.md"
QUALITY_DOC = "docs/quality.md"
QUALITY_RESULTS = "docs/results/quality.json"
COMMANDS = {
    "plora-plan": "plora.planner.cli",
    "plora-tune": "plora.models.tune_cli",
    "plora-export": "plora.export.cli",
    "plora-cloud": "plora.cloud_server.cli",
    "plora-device": "plora.device_runtime.cli",
}
HELP_COLUMNS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes or checks the generated files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name each stale file")
    check = parser.parse_args().check
    stale = False
    for name, content in generated().items():
        path = ROOT / name
        if path.is_file() and path.read_bytes() == content:
            continue
        stale = True
        if check:
            print(f"{name}: stale, run `python tools/generated.py`", file=sys.stderr)
        else:
            path.write_bytes(content)
            print(f"wrote {name}")
    return 1 if check and stale else 0


def generated() -> dict[str, bytes]:
    """Path below the root -> content that it should have."""
    from plora.protocol.states import mermaid

    return {
        **protobuf_modules(),
        PROTOCOL_DOC: with_block(PROTOCOL_DOC, "states", f"```mermaid\n{mermaid()}\n```"),
        CLI_DOC: with_block(CLI_DOC, "cli", cli_reference()),
        QUALITY_DOC: with_block(QUALITY_DOC, "quality", quality_tables()),
    }


def protobuf_modules() -> dict[str, bytes]:
    """What protoc makes of the schema; the mapping gives the import path that the package has once installed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--python_out={folder}", f"--pyi_out={folder}"]
        command = [sys.executable, "-m", "grpc_tools.protoc", "-Iplora/protocol=protocol", *outputs, "plora/protocol/plora.proto"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"protoc failed: {done.stderr.strip()}")
        made = Path(folder) / "plora" / "protocol"
        return {f"protocol/{name}": (made / name).read_bytes() for name in ("plora_pb2.py", "plora_pb2.pyi")}


def with_block(name: str, marker: str, block: str) -> bytes:
    """The file with what lies between the markers replaced."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    try:
        text = (ROOT / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        sys.exit(f"{name}: not found")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"{name}: expected {begin} and {end}, once each and in this order")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}".encode()


def quality_tables() -> str:
    sys.path.insert(0, str(ROOT))
    from bench.quality.tables import markdown

    return markdown(json.loads((ROOT / QUALITY_RESULTS).read_text(encoding="utf-8")))


def cli_reference() -> str:
    """`--help` of every command and subcommand, as Markdown."""
    sections = []
    for name, module in COMMANDS.items():
        try:
            command = importlib.import_module(module).main
        except ImportError as error:
            sys.exit(f"{name}: {module} cannot be imported ({error}); install plora with its `dev` extra")
        for path, text in helps(name, command, None):
            sections.append(f"## `{path}`\n\n```text\n{text}\n```")
    return "\n\n".join(sections)


def helps(name: str, command: Any, parent: Any) -> Iterator[tuple[str, str]]:
    """(command path, help text) of a click command and of those below it."""
    import click

    context = click.Context(command, info_name=name, parent=parent, terminal_width=HELP_COLUMNS, **command.context_settings)
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from helps(child, command.commands[child], context)


if __name__ == "__main__":
    sys.exit(main())
