"""`plora-device`: parses, calls the API, turns errors into one line and an exit code."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors

if TYPE_CHECKING:
    from .access import Access
    from .api import Piece, PrivateSession
    from .sampling import Sampling

BUCKET_TOKENS = 8
"""Of --deterministic: more would cost each token more, fewer each prompt. docs/networks.md has what 8 costs."""

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
def main() -> None:
    """The device's half of a PrivateLoRA model: your text, your cores, your sampling."""


def access_options(function: Command) -> Command:
    """How the device knows its cloud, and shows who it is."""
    path = click.Path(path_type=Path)
    options = [
        click.option(
            "--token-file",
            type=path,
            metavar="FILE",
            help="Holds your access token, for a cloud that wants one. [default: PLORA_TOKEN, if set]",
        ),
        click.option("--ca", type=path, metavar="FILE", help="Trust only a cloud whose certificate this one signs, or is (PEM)."),
        click.option(
            "--pin", "pins", multiple=True, metavar="SHA256", help="Trust only a cloud with this very certificate; may be given twice."
        ),
        click.option("--client-cert", type=path, metavar="FILE", help="Your certificate, for a cloud that asks for one (PEM)."),
        click.option("--client-key", type=path, metavar="FILE", help="Its private key (PEM)."),
        click.option("--server-name", metavar="NAME", help="That the cloud's certificate is for, if not the host's."),
        click.option("--plaintext", is_flag=True, help="No TLS, although the cloud is elsewhere: whoever is on the way reads all of it."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def access_from(options: dict[str, Any]) -> Access:
    """Takes these options out of `options`."""
    from .access import Access, read_token

    names = ("ca", "pins", "client_cert", "client_key", "server_name", "plaintext")
    return Access(read_token(options.pop("token_file")), **{name: options.pop(name) for name in names})


def session_options(function: Command) -> Command:
    options = [
        click.option("--edge", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The `edge` folder of an export."),
        click.option("--cloud", required=True, metavar="HOST:PORT", help="Where plora-cloud serves the other half."),
        click.option("--cores", metavar="FILE", help="Another persona's cores.safetensors; `none` for the base model."),
        click.option(
            "--graphs",
            type=click.Choice(["onnx", "ort"]),
            default="onnx",
            show_default=True,
            help="Which of the two forms of the edge graphs to run.",
        ),
        click.option(
            "--wire-dtype",
            default="fp32",
            show_default=True,
            metavar="DTYPE",
            help="Of tensors on the network: fp32, fp16, bf16 or int8; or by kind, as in entry=fp16,injections=int8,exit=fp16.",
        ),
        click.option(
            "--speculate/--no-speculate",
            default=True,
            show_default=True,
            help="Guess tokens from the conversation and have several checked in one step: the same answer, sooner.",
        ),
        click.option(
            "--deterministic",
            is_flag=True,
            help=f"Pad every step to {BUCKET_TOKENS} tokens: answers equal bit for bit, however the link breaks. Slower, more bytes.",
        ),
        click.option(
            "--give-up-seconds",
            type=click.FloatRange(0, min_open=True),
            default=60.0,
            show_default=True,
            metavar="S",
            help="How long to try for a link that broke.",
        ),
        click.option(
            "--threads", type=click.IntRange(1), metavar="N", help="Threads for the output head and the device's layers. [default: up to 4]"
        ),
        click.option("--max-tokens", type=int, metavar="N", help="Most new tokens. [default: the artifact's, else 256]"),
        click.option("--temperature", type=float, metavar="T", help="0 is plain argmax. [default: the artifact's, else 0]"),
        click.option("--top-k", type=int, metavar="K", help="Sample from the K best; 0 is off. [default: the artifact's, else 0]"),
        click.option("--top-p", type=float, metavar="P", help="Sample from the best that sum to P. [default: the artifact's, else 1]"),
        click.option("--repetition-penalty", type=float, metavar="R", help="1 is off. [default: the artifact's, else 1]"),
        click.option("--seed", type=int, metavar="N", help="Same seed, same answer. [default: random]"),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; may be given more than once."),
    ]
    for option in reversed(options):
        function = option(function)
    return access_options(function)


@main.command()
@click.argument("prompt")
@session_options
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="The prompt as it is: no chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token_ids, finish_reason, stats.")
@click.option("--stats", is_flag=True, help="Print time to first token, tokens/s, bytes and round trips to standard error.")
@reports_errors
def generate(prompt: str, system: str | None, raw: bool, as_json: bool, stats: bool, **options: Any) -> None:
    """Answer PROMPT, token by token.

    PROMPT may be -, which is what standard input holds: others on this machine can read a command line.
    """
    prompt = read_prompt(prompt)
    with open_from(options) as session:
        sampling = session.sampling(**sampling_flags(options))
        if raw:
            pieces = session.stream_raw(prompt, sampling)
        else:
            messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
            pieces = session.stream_chat(messages, sampling)
        for piece in pieces:
            if not as_json:
                click.echo(piece.text, nl=False)
        answer = session.answer
        assert answer is not None  # the stream ended by itself
        click.echo(json.dumps(answer.as_dict(), ensure_ascii=False) if as_json else "")
        if stats:
            print_stats(session)


@main.command()
@session_options
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option("--stats", is_flag=True, help="Print figures after each answer, to standard error.")
@reports_errors
def chat(system: str | None, stats: bool, **options: Any) -> None:
    """Talk. Ctrl-C ends an answer, Ctrl-D the conversation; /reset forgets it.

    A turn that fails is told of and left out: the conversation goes on without it. Where the input is no terminal, the exit code is
    in the end that of the last such turn.
    """
    with open_from(options) as session:
        opening = [{"role": "system", "content": system}] if system else []
        failed = converse(session, session.sampling(**sampling_flags(options)), opening, stats)
    if not sys.stdin.isatty():
        sys.exit(failed)


@main.command()
@click.option(
    "--edge",
    "edges",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="An `edge` folder: first that of the cloud's other half, then any others of the same base, to be compared.",
)
@click.option("--cloud", required=True, metavar="HOST:PORT", help="Where plora-cloud serves the other half of the first edge.")
@click.option("--wire-dtype", default="fp32", show_default=True, metavar="DTYPE", help="As for `generate`.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="As for `generate`. [default: up to 4]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@access_options
@reports_errors
def doctor(edges: tuple[Path, ...], cloud: str, wire_dtype: str, threads: int | None, as_json: bool, **options: Any) -> None:
    """Measure link, device and cloud; predict speed and bytes of each edge's plan; say what binds and what would help.

    Takes about half a minute and some megabytes each way. Sends zeros and tokens from all over the vocabulary, nothing of yours.
    """
    from ..protocol import read_precision
    from .doctor import examine, tables

    threads = threads or min(4, os.cpu_count() or 1)
    report = examine(
        list(edges), cloud, read_precision(wire_dtype), threads, lambda line: click.echo(f"{line} …", err=True), access_from(options)
    )
    click.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else tables(report))


def converse(session: PrivateSession, sampling: Sampling, opening: list[dict[str, str]], stats: bool) -> int:
    """Answers line by line until the input ends. Returns the exit code of the last turn that failed, 0 if none did."""
    from ..artifact.errors import ContextOverflow, PloraError

    keep_odd_bytes()
    messages, failed = list(opening), 0
    while (line := read_line()) is not None:
        if line == "/reset":
            messages = list(opening)
        if line in ("", "/reset"):
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            said = speak(session.stream_chat(asked, sampling))
        except PloraError as error:
            advice = "/reset begins anew" if isinstance(error, ContextOverflow) else "this turn is left out, those before it are kept"
            click.echo(f"error: {error}; {advice}", err=True)
            failed = error.exit_code
            continue
        messages = [*asked, {"role": "assistant", "content": said}]
        if stats and session.answer:
            print_stats(session)
    return failed


def read_line() -> str | None:
    """What the person says next, None at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None


def read_prompt(prompt: str) -> str:
    """PROMPT, or what standard input holds if that is `-`, without the newline at its end."""
    if prompt != "-":
        return prompt
    keep_odd_bytes()
    return sys.stdin.read().removesuffix("\n")


def keep_odd_bytes() -> None:
    """Standard input is read as arguments are: what cannot be decoded becomes lone surrogates, which text.py refuses. Before the first
    read, or not at all."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def speak(pieces: Iterator[Piece]) -> str:
    """Prints an answer as it comes; Ctrl-C ends it where it stands."""
    said = ""
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
            said += piece.text
    except KeyboardInterrupt:
        click.echo(" …", nl=False)
    finally:
        click.echo()
    return said


def open_from(options: dict[str, Any]) -> PrivateSession:
    from .api import open_session
    from .drafts import NgramDrafts
    from .transport import Deadlines

    base_only = options["cores"] == "none"
    return open_session(
        options["edge"],
        options["cloud"],
        cores=None if base_only else options["cores"],
        base_only=base_only,
        graphs=options["graphs"],
        threads=options["threads"] or min(4, os.cpu_count() or 1),
        wire_dtype=options["wire_dtype"],
        deadlines=Deadlines(give_up_seconds=options["give_up_seconds"]),
        drafter=NgramDrafts() if options["speculate"] else None,
        bucket=BUCKET_TOKENS if options["deterministic"] else None,
        on_state=say_state,
        access=access_from(options),
    )


def say_state(state: str) -> None:
    """Between two tokens, on standard error: what a person sees while the link is gone."""
    click.echo(f" [{state}…] " if state != "connected" else f"[{state}] ", nl=False, err=True)


def sampling_flags(options: dict[str, Any]) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return {**{name: options[name] for name in names}, "stop": options["stop"] or None}


def print_stats(session: PrivateSession) -> None:
    assert session.answer is not None
    s = session.answer.stats
    click.echo(
        f"[first token {s.ttft_seconds:.2f} s; {s.tokens_per_second:.1f} tokens/s; {s.new_tokens} new, {s.prompt_tokens} prompt tokens, "
        f"{s.cached_tokens} of them cached; per token {s.bytes_up_per_token:,.0f} bytes up, {s.bytes_down_per_token:,.0f} down, "
        f"{s.round_trips_per_token:.2g} round trips; {s.accepted_tokens} of {s.drafted_tokens} drafted tokens right; "
        f"in all {s.bytes_up:,} bytes up, {s.bytes_down:,} down]",
        err=True,
    )
