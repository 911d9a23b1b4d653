"""The devices of bench/soak.py: a process with several sessions, each in a thread of its own, whose answers are judged as they end.

`python -m bench.soak_device '{"devices": …}'` (the fields of Devices) prints one JSON object a line for each answer until its input ends;
then the devices leave in good order. With {"record": …} it writes what a link that works makes of the same prompts, and ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plora.artifact.errors import PloraError, Refused, RemoteProtocolError
from plora.device_runtime import open_session
from plora.device_runtime.cli import BUCKET_TOKENS
from plora.device_runtime.drafts import NgramDrafts

from .cuts import NEW_TOKENS, Tally, Undisturbed
from .prompts import CODE, ITEMS, PASSAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plora.device_runtime import PrivateSession

TALKS = (
    ("The ferry",),
    (CODE[:80],),
    (ITEMS,),
    (PASSAGE + CODE + ITEMS,),
    ("Where is the ferry?", " And the doctor, on which day", PASSAGE[:150], " What then?"),
    (PASSAGE[:400], " Say that again: the ferry between Marrow Point", CODE[:60]),
)
"""What is said in each conversation, turn after turn; the first of a long one takes several steps, all that the context has room for."""
MOST_ANSWERS = 12
"""Of one session, before its device leaves and begins another one."""
CLOSED_SHARE, INTERRUPTED_SHARE, FORGOTTEN_SHARE, LAST_TURN_SHARE, NAP_SHARE = 0.12, 0.08, 0.25, 0.25, 0.06
"""Of answers: closed early; given up by Ctrl-C in the middle of a step; after `forget`; with which a conversation ends before its end; with
a nap behind them."""
THINK_SECONDS = 0.3
"""Between two answers: drawn evenly from 0 on."""
INTERRUPT_SECONDS = 0.3
"""From asking for an answer to Ctrl-C: drawn evenly from 0 on; if it is over by then, it is a whole one."""
MOST_RETRY_SECONDS = 5.0
"""After a refusal, however long the cloud would like."""


@dataclass(frozen=True)
class Style:
    """How a session is held. judged_by: the style whose undisturbed answers it must give; share: of sessions. Wire precisions below fp32
    round last bits up to much more, so near ties are no measure there: those sessions are deterministic, and have none."""

    judged_by: str
    share: float
    wire_dtype: str = "fp32"
    bucket: int | None = None
    drafts: bool = False

    def open(self, edge: Path, address: str) -> PrivateSession:
        """Its answers always have as many tokens as are asked for."""
        drafter = NgramDrafts() if self.drafts else None
        session = open_session(edge, address, threads=1, wire_dtype=self.wire_dtype, drafter=drafter, bucket=self.bucket)
        session.text.defaults = dataclasses.replace(session.text.defaults, eos_token_ids=())
        return session


STYLES = {
    "plain": Style("plain", 0.4),
    "drafts": Style("plain", 0.3, drafts=True),
    "deterministic": Style("deterministic", 0.2, bucket=BUCKET_TOKENS),
    "deterministic, narrow": Style("deterministic, narrow", 0.1, "entry=fp16,injections=int8,exit=fp16", BUCKET_TOKENS),
}


@dataclass(frozen=True)
class Devices:
    """address: of their link, host:port; truth: the file that `record` wrote; sessions: at a time; naps_seconds: how long a device may
    have nothing to say, past one and another of the cloud's deadlines."""

    address: str
    edge: str
    truth: str
    sessions: int
    seed: str
    naps_seconds: tuple[float, ...]


# Truth


@dataclass(frozen=True)
class Turn:
    """digests: of the logits that each token was chosen from."""

    wanted: Undisturbed
    digests: list[str]

    def upto(self, count: int, exact: bool) -> Undisturbed:
        """Of an answer that ended after so many tokens. exact: no tie is near enough."""
        gaps = [math.inf] * count if exact else self.wanted.gaps[:count]
        return Undisturbed(self.wanted.prompt, self.wanted.tokens[:count], gaps)


class Watch:
    """Sees all logits that a session's tokens are chosen from, by single rows; drafts have several, which it does not tell apart."""

    def __init__(self, session: PrivateSession) -> None:
        self.real = session._logits
        self.rows: list[Any] = []
        session._logits = self.noted  # type: ignore[method-assign]

    def noted(self, ids: list[int], rows: int, position: int) -> Any:
        logits = self.real(ids, rows, position)
        self.rows.append(logits[-1].copy())
        return logits

    def digests(self) -> list[str]:
        return [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in self.rows]

    def gaps(self) -> list[float]:
        return [float(best[1] - best[0]) for best in (np.partition(row, -2)[-2:] for row in self.rows)]


def record(edge: Path, address: str, file: Path, talks: tuple[tuple[str, ...], ...] = TALKS) -> None:
    """Every prompt sent whole, in each style that others are judged by."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name in sorted({style.judged_by for style in STYLES.values()}):
        with STYLES[name].open(edge, address) as session:
            watch = Watch(session)
            most = session._stepper.context_tokens - 2 * NEW_TOKENS
            found[name] = [_talk(session, watch, texts, most) for texts in talks]
    file.write_text(json.dumps(found), encoding="utf-8")


def _talk(session: PrivateSession, watch: Watch, texts: tuple[str, ...], most: int) -> list[dict[str, Any]]:
    """One conversation; turns that would take more than `most` tokens are left out."""
    turns: list[dict[str, Any]] = []
    for text in texts:
        before = turns[-1]["prompt"] + turns[-1]["tokens"] if turns else []
        prompt = before + session.text.encode_raw(text)
        if turns and len(prompt) > most:
            break
        session.forget()
        watch.rows.clear()
        tokens = [piece.token_id for piece in session.stream(prompt[:most], greedy(session))]
        turns.append({"prompt": prompt[:most], "tokens": tokens, "gaps": watch.gaps(), "digests": watch.digests()})
    return turns


def read_truth(file: Path) -> dict[str, list[list[Turn]]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: [[Turn(Undisturbed(turn["prompt"], turn["tokens"], turn["gaps"]), turn["digests"]) for turn in talk] for talk in talks]
        for name, talks in found.items()
    }


def greedy(session: PrivateSession) -> Any:
    return session.sampling(max_tokens=NEW_TOKENS, temperature=0.0)


def judge(style: Style, turn: Turn, tokens: list[int], digests: list[str]) -> dict[str, Any]:
    """wrong_tokens: lost, doubled or changed against the undisturbed run; near_ties: 1 if another token was chosen there between two
    logits that are nearly equal; other_bits: rows of logits of a deterministic session that are not equal bit for bit."""
    exact, count = style.bucket is not None, len(tokens)
    tally, wanted = Tally(), turn.upto(count, exact)
    tally.judge(tokens, wanted, 0)
    wrong = sum(tally.figures[name] for name in ("tokens_lost", "tokens_doubled", "tokens_changed"))
    found = {"wrong_tokens": wrong, "near_ties": tally.figures["near_ties"], "other_bits": 0}
    if exact:
        found["other_bits"] = sum(own != other for own, other in zip(digests[:count], turn.digests[:count], strict=False))
    if wrong:
        found["mistake"] = {"prompt_tokens": len(wanted.prompt), "wanted": wanted.tokens, "got": tokens, "gaps": turn.wanted.gaps[:count]}
    return found


# Life


class Device(threading.Thread):
    """Opens one session after another, and says of each answer how it was."""

    def __init__(self, devices: Devices, truth: dict[str, list[list[Turn]]], index: int, stopping: threading.Event) -> None:
        super().__init__(name=f"device {index}", daemon=True)
        self.devices, self.truth, self.stopping = devices, truth, stopping
        self.random = random.Random(f"{devices.seed} {index}")

    def run(self) -> None:
        while not self.stopping.is_set():
            (name,) = self.random.choices(list(STYLES), [style.share for style in STYLES.values()])
            try:
                session = STYLES[name].open(Path(self.devices.edge), self.devices.address)
            except Exception as error:
                self.fail("opening", name, error)
                continue
            for doing, do in (("talking", lambda: self.converse(session, name)), ("closing", session.close)):  # noqa: B023  called here
                try:
                    do()
                except Exception as error:
                    self.fail(doing, name, error)

    def fail(self, when: str, style: str, error: Exception) -> None:
        """Of an error that reached the application."""
        if not isinstance(error, PloraError) or isinstance(error, RemoteProtocolError):
            traceback.print_exc()
        say(style=style, error=f"{type(error).__name__} while {when}", detail=str(error))
        pause = error.retry_after_millis / 1e3 if isinstance(error, Refused) else 0.0
        self.stopping.wait(min(pause, MOST_RETRY_SECONDS) or self.random.uniform(0, 1))

    def converse(self, session: PrivateSession, name: str) -> None:
        watch = Watch(session)
        for _ in range(self.random.randint(2, MOST_ANSWERS)):
            for turn in self.random.choice(self.truth[STYLES[name].judged_by]):
                if self.stopping.is_set():
                    return
                if self.random.random() < FORGOTTEN_SHARE:
                    session.forget()
                try:
                    self.answer(session, name, turn, watch)
                except Exception as error:
                    self.fail("answering", name, error)
                nap = self.random.random() < NAP_SHARE
                self.stopping.wait(self.random.choice(self.devices.naps_seconds) if nap else self.random.uniform(0, THINK_SECONDS))
                if self.random.random() < LAST_TURN_SHARE:
                    break

    def answer(self, session: PrivateSession, name: str, turn: Turn, watch: Watch) -> None:
        """One answer, or its beginning; also of one that fails, what there is of it is judged. Raises what the session raises."""
        draw = self.random.random()
        most = self.random.randrange(1, NEW_TOKENS) if draw < CLOSED_SHARE else NEW_TOKENS
        interrupted = CLOSED_SHARE <= draw < CLOSED_SHARE + INTERRUPTED_SHARE
        watch.rows.clear()
        began, before = time.monotonic(), (session._link.reconnections, session._stepper.counters.replayed_tokens)
        tokens: list[int] = []
        ending = "failed"
        try:
            with ctrl_c(session, self.random.uniform(0, INTERRUPT_SECONDS) if interrupted else None):
                stream = session.stream(turn.wanted.prompt, greedy(session))
                for piece in stream:
                    tokens.append(piece.token_id)
                    if len(tokens) == most or self.stopping.is_set():
                        break
                stream.close()  # type: ignore[attr-defined]  a generator
            ending = "finished" if len(tokens) == NEW_TOKENS else "closed"
        except KeyboardInterrupt:
            ending = "interrupted"
        finally:
            reconnections, replayed = session._link.reconnections, session._stepper.counters.replayed_tokens
            counts = {"reconnections": reconnections - before[0], "replayed_tokens": replayed - before[1]}
            seconds = time.monotonic() - began
            say(
                style=name, ending=ending, tokens=len(tokens), seconds=seconds, **counts,
                **judge(STYLES[name], turn, tokens, watch.digests()),
            )  # fmt: skip


@contextmanager
def ctrl_c(session: PrivateSession, seconds: float | None) -> Iterator[None]:
    """Does after so long what SIGINT does in the main thread; devices here have threads of their own, which no signal reaches."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, session._runner._on_signal, (signal.SIGINT, None))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


_saying = threading.Lock()


def say(**fields: Any) -> None:
    with _saying:
        print(json.dumps(fields), flush=True)


def main() -> None:
    match json.loads(sys.argv[1]):
        case {"record": {"edge": edge, "address": address, "file": file}}:
            record(Path(edge), address, Path(file))
        case {"devices": fields}:
            devices = Devices(**fields)
            truth = read_truth(Path(devices.truth))
            stopping = threading.Event()
            threads = [Device(devices, truth, index, stopping) for index in range(devices.sessions)]
            for thread in threads:
                thread.start()
            sys.stdin.read()
            stopping.set()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    main()
