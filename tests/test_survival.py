"""Cuts, kills, leases and Ctrl-C against real servers: whatever happens on the way, the tokens are those of an undisturbed run.

Links are cut at every gRPC message of a short generation (bench/link.py), whether the message still arrives or not. Servers are processes
of the real command; they are forked from one that has imported everything, since importing is nearly all that a start costs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.link import Link
from bench.profiles import rtt_only
from plora.artifact.errors import PloraError, ServerFull, Unreachable, UsageError
from plora.device_runtime import PrivateSession, open_session, pace
from plora.device_runtime.drafts import Draft, NgramDrafts
from plora.device_runtime.link import CONNECTED, RECONNECTING, REPLAYING
from plora.device_runtime.sampling import Sampling
from plora.device_runtime.stepper import Stepper
from plora.device_runtime.transport import Deadlines
from plora.models.checkpoint import Base
from plora.models.formula import adapted
from plora.protocol import Precision
from plora.protocol import plora_pb2 as pb
from plora.protocol.outbox import Outbox
from plora.protocol.roles import DeviceSession

from .conftest import Made, answer, greedy, make_export, oracle
from .test_serving import BOUND_SECONDS, machine_of, raw

STEP_TOKENS = 8
"""Of these servers, so that a short prompt takes several steps, which are in flight together."""
PROMPT = [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9]
CHUNKS = 2
"""Of the prompt."""
COUNT = 5
STEPS = CHUNKS + COUNT - 1
PATIENT = Deadlines(step_seconds=BOUND_SECONDS, give_up_seconds=BOUND_SECONDS)

# Servers

ZYGOTE = '''
import json, os, signal, socket, sys
from functools import partial
from plora.cloud_server import cache, cli, config, engine, serve

signal.signal(signal.SIGINT, signal.SIG_IGN)
children = []

def tell(owner, name, line):
    """Says on standard output what a method does."""
    real = getattr(owner, name)
    def telling(self, *arguments):
        result = real(self, *arguments)
        sys.stdout.write(line(result, *arguments) + "\\n")
        return result
    setattr(owner, name, telling)

def child(port, settings, arguments):
    end = socket.create_connection(("127.0.0.1", port))
    for number in (1, 2):
        os.dup2(end.fileno(), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    print(f"pid {os.getpid()}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine.step_tokens = lambda plan, shape: settings["step_tokens"]
    config.Limits = partial(config.Limits, write_seconds=settings["write_seconds"])
    tell(engine.Engine, "begin", lambda row, slot, length, hidden, *rest: f"step {slot} {length} {len(hidden)}")
    tell(cache.Pool, "take", lambda slot: "full" if slot is None else "took")
    tell(cache.Pool, "free", lambda result, slot: "gave")
    cli.main(["serve", *arguments])

for line in sys.stdin:
    port, settings, arguments = json.loads(line)
    pid = os.fork()
    if pid:
        children.append(pid)
        continue
    try:
        child(port, settings, arguments)
    finally:
        os._exit(0)
for pid in children:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(pid, 0)
'''


class House:
    """A cloud. Everything that it says is read at once, so that what happens in it can be waited for."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, *flags: str, **settings: float) -> None:
        self.lines: list[str] = []
        self.ended = False
        self._changed = threading.Condition()
        options = {"step_tokens": STEP_TOKENS, "write_seconds": 30.0, **settings}
        arguments = [str(folder), "--listen", "127.0.0.1:0", "--threads", "1", "--kv-bytes", str(64 << 20), "--verbose", *flags]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(BOUND_SECONDS)
            assert process.stdin is not None
            process.stdin.write(json.dumps([listener.getsockname()[1], options, arguments]) + "\n")
            process.stdin.flush()
            self._end, _ = listener.accept()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._warm = 0
        self.pid = int(self.wait("pid ").split()[1])
        self.address = self.wait("listening on ").split()[-1]
        self._warm = self.sessions

    def _read(self) -> None:
        with self._end, self._end.makefile() as lines:
            for line in lines:
                with self._changed:
                    self.lines.append(line.rstrip())
                    self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait(self, text: str, after: int = 0) -> str:
        """The first line from `after` on that holds `text`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._find(text, after) or self.ended, BOUND_SECONDS) or not (
                found := self._find(text, after)
            ):
                pytest.fail(f"the cloud did not say {text!r}: {self.lines[after:]}")
            return found

    def _find(self, text: str, after: int) -> str | None:
        return next((line for line in self.lines[after:] if text in line), None)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Asked anew with each line."""
        with self._changed:
            if not self._changed.wait_for(true, BOUND_SECONDS):
                pytest.fail(f"never came about: {self.lines[-20:]}")

    def wait_for_end(self) -> None:
        self.wait_until(lambda: self.ended)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait_for_end()

    @property
    def now(self) -> int:
        return len(self.lines)

    def steps(self, after: int) -> list[tuple[int, ...]]:
        """(slot, position, tokens) of each step that the engine began."""
        return [tuple(map(int, line.split()[1:])) for line in self.lines[after:] if line.startswith("step ")]

    @property
    def taken(self) -> int:
        """Slots so far."""
        return self.lines.count("took")

    @property
    def sessions(self) -> int:
        """Slots in use."""
        return self.taken - self.lines.count("gave") - self._warm


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., House]]:
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # no threads that a fork would lose
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=single)
    try:
        yield lambda folder, *flags, **settings: House(process, folder, *flags, **settings)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(BOUND_SECONDS)


@pytest.fixture(scope="module")
def house(made: Made, start: Callable[..., House]) -> House:
    return start(made.out / "cloud")


@pytest.fixture(scope="module")
def second(made: Made, start: Callable[..., House]) -> House:
    """Another cloud of the same halves."""
    return start(made.out / "cloud")


@pytest.fixture(scope="module")
def layered_house(layered: Made, start: Callable[..., House]) -> House:
    return start(layered.out / "cloud")


@pytest.fixture(scope="module")
def layered_second(layered: Made, start: Callable[..., House]) -> House:
    return start(layered.out / "cloud")


@pytest.fixture(scope="module")
def expected(merged: Base) -> list[int]:
    tokens = greedy(merged, PROMPT, COUNT)
    assert len(tokens) == COUNT
    return tokens


@pytest.fixture(scope="module")
def layered_expected(layered: Made) -> list[int]:
    base = oracle(layered)
    with adapted(base.model, layered.adapter):
        tokens = greedy(base, PROMPT, COUNT)
    assert len(tokens) == COUNT
    return tokens


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is suspected because this machine is busy: for exact counts, with links that are cut by reset alone."""
    monkeypatch.setattr(pace, "GRACE_SECONDS", 10.0)


# A session over a link


class Trip:
    """A session over a link that can be cut and led elsewhere. states: what `on_state` was told; on_state: asked each time, too."""

    def __init__(self, made: Made, house: House, rtt_millis: float = 0, **options: Any) -> None:
        self.link = Link(house.address, rtt_only(rtt_millis))
        self.states: list[str] = []
        self.on_state: Callable[[str], None] = lambda state: None
        self.house = house
        self.edge = made.out / "edge"
        self.options = {"deadlines": PATIENT, **options}

    def __enter__(self) -> Trip:
        with ExitStack() as stack:
            stack.enter_context(self.link)
            taken = self.house.taken
            self.session = stack.enter_context(open_session(self.edge, self.link.address, on_state=self._told, **self.options))
            self.house.wait_until(lambda: self.house.taken > taken)
            self.logits: dict[int, list[Any]] = {}
            real = self.session._logits

            def noted(ids: list[int], rows: int, position: int) -> Any:
                logits = real(ids, rows, position)
                for row, values in enumerate(logits, len(ids) - rows):
                    self.logits.setdefault(position + row, []).append((ids[: row + 1], values))
                return logits

            self.session._logits = noted  # type: ignore[method-assign]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _told(self, state: str) -> None:
        self.states.append(state)
        self.on_state(state)

    def lead_to(self, house: House | None) -> None:
        """Connections from now on; None: they are refused."""
        host, port = (house.address if house is not None else NOWHERE).split(":")
        self.link.target = (host, int(port))

    @property
    def messages(self) -> int:
        crossed = self.link.counters()
        return crossed.up_messages + crossed.down_messages

    def cut_at(self, message: int, kind: str, delivered: bool, seconds: float = 0.0) -> None:
        """When so many more messages have crossed."""
        try:
            self.link.cut_at_message(self.messages + message, kind, seconds, deliver=delivered)
        except UsageError:  # a late pong has crossed in between
            self.cut_at(message, kind, delivered, seconds)

    def count_messages(self, prompt: list[int], count: int) -> int:
        """Of an undisturbed answer, pings aside."""
        before = self.session._stepper.counters.round_trips
        self.whole(prompt, count)
        return 2 * (self.session._stepper.counters.round_trips - before)

    def whole(self, prompt: list[int], count: int) -> list[int]:
        """An answer that needs no cache."""
        self.session.forget()
        return answer(self.session, prompt, count)

    @property
    def id(self) -> bytes:
        return self.session.terms.session

    def final_logits(self, tokens: list[int]) -> dict[int, Any]:
        """By position, of all rows that were computed behind these very tokens; those of one position must be equal bit for bit."""
        found: dict[int, Any] = {}
        for position, rows in self.logits.items():
            for ids, values in rows:
                if ids == tokens[position + 1 - len(ids) : position + 1]:
                    assert np.array_equal(found.setdefault(position, values), values), position
        return found


NOWHERE = "127.0.0.1:1"
"""tcpmux: nobody listens there."""

# Cuts at every message


def check_cuts(trip: Trip, house: House, expected: list[int], cuts: list[tuple[int, str, bool]]) -> None:
    """One session lives through all of them, and no step is computed twice on it."""
    first, taken, start = trip.id, house.taken, house.now
    assert trip.whole(PROMPT, COUNT) == expected
    house.wait_until(lambda: len(house.steps(start)) >= STEPS)
    steps = house.steps(start)
    assert len(steps) == len(set(steps)) == STEPS  # the control: there is something to compute twice
    for cut in cuts:
        broken, crossed, start = trip.session._link.reconnections, trip.link.counters().cuts, house.now
        trip.cut_at(*cut)
        trip.states.clear()
        assert trip.whole(PROMPT, COUNT) == expected, cut
        assert trip.whole(PROMPT[:1], 1), cut  # a cut at the very end is only noticed now
        house.wait_until(lambda start=start: len(house.steps(start)) > STEPS)
        assert house.steps(start)[:-1] == steps, cut
        assert trip.link.counters().cuts == crossed + 1, cut
        assert trip.session._link.reconnections > broken, cut  # a busy machine may seem to be a silent link
        assert trip.states[:2] == [RECONNECTING, CONNECTED], cut
        assert (trip.id, house.taken) == (first, taken), cut
    assert trip.session._stepper.counters.replayed_tokens == 0


WAYS = [(kind, delivered) for kind in ("reset", "silence") for delivered in (True, False)]


def test_a_cut_at_any_message_changes_nothing(made: Made, house: House, expected: list[int]) -> None:
    """The paper's plan: each message once, cut in turn by reset and by silence, delivered or not."""
    with Trip(made, house) as trip:
        messages = trip.count_messages(PROMPT, COUNT)
        assert messages == STEPS * 2 * made.adapter.config.plan.round_trips
        check_cuts(trip, house, expected, [(index, *WAYS[(index + index // 4) % 4]) for index in range(messages)])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "delivered"), WAYS)
@pytest.mark.parametrize("rtt_millis", [0, 20])
def test_a_cut_at_any_message_of_any_kind(
    kind: str, delivered: bool, rtt_millis: float, made: Made, house: House, expected: list[int]
) -> None:
    with Trip(made, house, rtt_millis) as trip:
        messages = trip.count_messages(PROMPT, COUNT)
        check_cuts(trip, house, expected, [(index, kind, delivered) for index in range(messages)])


@pytest.mark.parametrize("kind", ["reset", "silence"])
def test_a_cut_at_any_message_of_one_round_trip(kind: str, layered: Made, layered_house: House, layered_expected: list[int]) -> None:
    """Layers on the device, and one exchange of messages per step."""
    with Trip(layered, layered_house) as trip:
        messages = trip.count_messages(PROMPT, COUNT)
        assert messages == STEPS * 2
        check_cuts(trip, layered_house, layered_expected, [(index, kind, index // 2 % 2 == 0) for index in range(messages)])


# Another server at every message


def check_replays(trip: Trip, houses: list[House], expected: list[int], messages: range, kind: Callable[[int], tuple[str, bool]]) -> None:
    """At each message the session's cloud is gone, and another in its place, as after a kill: it knows nothing of the session."""
    trip.logits.clear()
    assert trip.whole(PROMPT, COUNT) == expected
    undisturbed = trip.final_logits(PROMPT + expected)
    assert len(undisturbed) >= COUNT
    for index in messages:
        houses = [*houses[1:], houses[0]]
        trip.lead_to(houses[0])
        trip.logits.clear()
        before, replayed, start = trip.id, trip.session._stepper.counters.replayed_tokens, houses[0].now
        trip.cut_at(index, *kind(index))
        trip.states.clear()
        assert trip.whole(PROMPT, COUNT) == expected, index
        seen = trip.final_logits(PROMPT + expected)
        assert trip.whole(PROMPT[:1], 1)
        assert trip.id != before, index
        again = trip.session._stepper.counters.replayed_tokens - replayed
        assert trip.states[:2] == [RECONNECTING, CONNECTED], index
        assert (REPLAYING in trip.states) == bool(again), index
        assert trip.session.state == CONNECTED, index
        steps = houses[0].steps(start)
        if trip.session._stepper.bucket is None:
            assert len(steps) == len(set(steps)), index
        else:
            for position, values in undisturbed.items():
                assert np.array_equal(seen[position], values), (index, position)


def test_another_server_at_many_messages(made: Made, house: House, second: House, expected: list[int]) -> None:
    with Trip(made, house) as trip:
        messages = range(0, trip.count_messages(PROMPT, COUNT), 3)
        check_replays(trip, [house, second], expected, messages, lambda index: ("reset", index % 2 == 0))


def test_another_server_at_any_message_bit_for_bit(
    layered: Made, layered_house: House, layered_second: House, layered_expected: list[int]
) -> None:
    with Trip(layered, layered_house, bucket=8) as trip:
        messages = range(trip.count_messages(PROMPT, COUNT))
        check_replays(trip, [layered_house, layered_second], layered_expected, messages, lambda index: WAYS[index % 4])


@pytest.mark.slow
@pytest.mark.parametrize("speculating", [False, True])
@pytest.mark.parametrize(("kind", "delivered"), WAYS)
def test_another_server_at_any_message_of_any_kind_bit_for_bit(
    kind: str, delivered: bool, speculating: bool, made: Made, house: House, second: House, expected: list[int]
) -> None:
    with Trip(made, house, bucket=8, drafter=NgramDrafts() if speculating else None) as trip:
        messages = range(trip.count_messages(PROMPT, COUNT))
        check_replays(trip, [house, second], expected, messages, lambda index: (kind, delivered))


# Bit for bit, whatever the way there


class Knowing:
    """Drafts five tokens that are right but for every seventh."""

    vocabulary = None

    def __init__(self) -> None:
        self.text: list[int] = []

    def match(self, tokens: Sequence[int]) -> int:
        return 4

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        start = len(tokens)
        drafted = self.text[start : start + 5]
        return Draft(tuple(token if (start + index) % 7 else (token + 1) % 300 for index, token in enumerate(drafted)), matched=4)

    def reset(self) -> None:
        pass


@pytest.mark.parametrize("halves", ["made", "layered"])
def test_logits_do_not_depend_on_the_way(halves: str, request: pytest.FixtureRequest) -> None:
    """Every step of one size from a multiple of it: with drafts and without, in one turn or several, after a rollback, replayed elsewhere."""
    made, house, second = (
        request.getfixturevalue(name)
        for name in (("made", "house", "second") if halves == "made" else ("layered", "layered_house", "layered_second"))
    )
    count = 24
    drafter = Knowing()
    with Trip(made, house, bucket=8) as trip, Trip(made, second, bucket=8, drafter=drafter) as drafting, Trip(made, house) as plain:
        for one in (trip, drafting, plain):
            one.session.text.defaults = replace(one.session.text.defaults, eos_token_ids=())
        tokens = trip.whole(PROMPT, count)
        text = drafter.text = PROMPT + tokens
        assert len(tokens) == count
        undisturbed = trip.final_logits(text)

        def check(other: Trip, at_least: int) -> None:
            found = other.final_logits(text)
            assert len(found) >= at_least
            for position, values in found.items():
                if position in undisturbed:
                    assert np.array_equal(values, undisturbed[position]), position
            other.logits.clear()

        assert drafting.whole(PROMPT, count) == tokens
        assert drafting.session.answer is not None
        assert 0 < drafting.session.answer.stats.accepted_tokens < drafting.session.answer.stats.drafted_tokens
        check(drafting, len(tokens) - 1)
        # Turns
        for one, ends in ((trip, (3, 9, 17, 20, 27)), (drafting, (12, 13, 14, 15, 16)), (trip, (8, 16, 24))):
            one.session.forget()
            one.logits.clear()
            for end in ends:
                answer(one.session, text[:end], 2)
            assert answer(one.session, text[: ends[-1]], len(text) - ends[-1]) == text[ends[-1] :]
            check(one, len(text) - ends[-1])
        # Rolled back into the middle, and on
        answer(trip.session, [*text[:22], 99, 98, 97], 3)
        trip.logits.clear()
        assert answer(trip.session, text[:23], len(text) - 23) == text[23:]
        check(trip, len(text) - 23)
        # Replayed in another place
        trip.lead_to(second)
        trip.session.reconnect()
        assert answer(trip.session, text[:30], len(text) - 30) == text[30:]
        check(trip, len(text) - 30)
        # The control: without, they differ in the last bits
        plain.whole(PROMPT, count)
        found = plain.final_logits(text)
        assert any(not np.array_equal(found[position], undisturbed[position]) for position in set(found) & set(undisturbed))


# Many cuts


def random_cuts(trip: Trip, houses: list[House], generator: random.Random, most: int) -> None:
    """From now on, whenever the session's state changes: some messages later, so also in the middle of a reconnection or a replay."""
    left = [most]

    def arm(state: str) -> None:
        if left[0]:
            left[0] -= 1
            if generator.random() < 0.3:
                trip.lead_to(generator.choice(houses))
            trip.cut_at(
                generator.choice([0, 1, 2, 3, 5, 8, 13, 21]), *generator.choice(WAYS), seconds=generator.choice([0.0, 0.0, 0.02, 0.1])
            )

    trip.on_state = arm
    arm(CONNECTED)


def check_random_cuts(made: Made, house: House, second: House, seeds: range, count: int, most: int, **options: Any) -> int:
    """Returns how many there were."""
    happened = 0
    with Trip(made, house, **options) as trip:
        trip.session.text.defaults = replace(trip.session.text.defaults, eos_token_ids=())
        expected = trip.whole(PROMPT, count)
        assert len(expected) == count
        for seed in seeds:
            random_cuts(trip, [house, second], random.Random(seed), most)
            before = trip.link.counters().cuts
            assert trip.whole(PROMPT, count) == expected, seed
            happened += trip.link.counters().cuts - before
            trip.on_state = lambda state: None
            trip.cut_at(1 << 30, "reset", True)
            trip.lead_to(house)
    return happened


def test_many_cuts_in_one_answer(made: Made, house: House, second: House) -> None:
    assert check_random_cuts(made, house, second, range(3), 40, 6) > 3 * 3


def test_many_cuts_in_one_answer_of_one_round_trip(layered: Made, layered_house: House, layered_second: House) -> None:
    assert check_random_cuts(layered, layered_house, layered_second, range(3), 40, 6, bucket=8, drafter=NgramDrafts()) > 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("halves", ["made", "layered"])
@pytest.mark.parametrize("bucket", [None, 8])
def test_very_many_cuts(halves: str, bucket: int | None, request: pytest.FixtureRequest) -> None:
    made, house, second = (
        request.getfixturevalue(name)
        for name in (("made", "house", "second") if halves == "made" else ("layered", "layered_house", "layered_second"))
    )
    assert check_random_cuts(made, house, second, range(100, 130), 80, 12, bucket=bucket) > 30 * 5


def test_a_cut_at_each_message_of_a_recovery(made: Made, house: House, second: House, expected: list[int]) -> None:
    """A first cut leads to another server; a second one hits what follows: the old session is refused, a new one begun and refilled."""
    with Trip(made, house) as trip:
        place, greeting = house, 4
        for index in range(greeting + 8):
            place = second if place is house else house

            before = trip.link.counters().cuts

            def again(state: str, index: int = index, before: int = before) -> None:
                if state == RECONNECTING and trip.link.counters().cuts == before + 1:
                    trip.cut_at(index, *WAYS[(index + index // 4) % 4])

            trip.on_state = again
            trip.lead_to(place)
            trip.cut_at(30, "reset", True)
            assert trip.whole(PROMPT, COUNT) == expected, index
            assert trip.link.counters().cuts == before + 2, index


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reset", "silence"])
def test_a_network_of_thirty_times_the_delay(kind: str, made: Made, house: House, expected: list[int]) -> None:
    """A connection takes longer to come about than it takes to begin many."""
    with Trip(made, house, 10, deadlines=replace(PATIENT, give_up_seconds=9.0)) as trip:
        stream = trip.session.stream(PROMPT, trip.session.sampling(max_tokens=COUNT, temperature=0.0))
        got = [next(stream).token_id]
        trip.link.profile = rtt_only(300)
        for shaper in trip.link.shapers.values():
            shaper.delay_seconds = 0.15
        trip.link.cut(kind, 0.1)
        assert got + [piece.token_id for piece in stream] == expected


def test_a_silence_while_a_long_prompt_goes_up(start: Callable[..., House], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits into any buffer: whoever waits for room must notice, too, and so again after the first time."""
    monkeypatch.setattr(pace, "SLOWEST_BITS_PER_SECOND", 1e9)
    wide: dict[str, Any] = {"hidden_size": 2112, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    made = make_export(tmp_path, verified=False, max_position_embeddings=1024, **wide)
    house = start(made.out / "cloud", "--context", "1024", step_tokens=256)
    prompt = list(range(2, 290)) * 3
    with Trip(made, house) as trip:
        expected = trip.whole(prompt, 3)
        real = trip.session.edge.embed
        for chunk in (0, 1, 5):
            left = [chunk]

            def embed(ids: list[int], left: list[int] = left) -> Any:
                if left[0] == 0:
                    trip.link.cut("silence", 0)
                left[0] -= 1
                return real(ids)

            monkeypatch.setattr(trip.session.edge, "embed", embed)
            assert trip.whole(prompt, 3) == expected
        assert trip.session._link.reconnections == 3


# A server is killed, or told to stop


AT_ONCE = ("--grace-seconds", "0")
"""Told to stop, the server would else let the answer finish, and nobody would have to move."""


class Blow:
    """Does something to a session's server when the device has read so many frames."""

    def __init__(self, session: PrivateSession, frame: int, act: Callable[[], None]) -> None:
        transport = session._link.transport
        assert transport is not None
        real, left = transport.receive, [frame]

        async def receive() -> bytes:
            data = await real()
            if left[0] == 0:
                act()
            left[0] -= 1
            return data

        transport.receive = receive  # type: ignore[method-assign]


def check_blow(number: signal.Signals, frame: int, trip: Trip, house: House, start: Callable[[], House], expected: list[int]) -> House:
    """The signal reaches the server at that frame; a new one is in its place as soon as it is gone. Returns that."""
    later: list[House] = []

    def restart() -> None:
        house.wait_for_end()
        later.append(start())
        trip.lead_to(later[0])

    def act() -> None:
        os.kill(house.pid, number)
        if number is signal.SIGKILL:
            restart()
        else:
            house.wait(" stopping ")
            trip.lead_to(None)
            threading.Thread(target=restart, daemon=True).start()

    before = trip.id
    trip.states.clear()
    trip.session.forget()
    Blow(trip.session, frame, act)
    assert answer(trip.session, PROMPT, COUNT) == expected, frame
    assert answer(trip.session, PROMPT[:1], 1)
    assert trip.id != before
    assert trip.states[:2] == [RECONNECTING, CONNECTED]
    later[0].wait_until(lambda: later[0].sessions == 1)
    return later[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_is_killed_or_stopped_is_replaced(
    number: signal.Signals, made: Made, start: Callable[..., House], expected: list[int]
) -> None:
    """In the prompt, in the middle of a step, between steps, at the last frame."""
    house = start(made.out / "cloud", *AT_ONCE)
    with Trip(made, house) as trip:
        for frame in (0, 9, 22):
            house = check_blow(number, frame, trip, house, lambda: start(made.out / "cloud", *AT_ONCE), expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_is_replaced_at_any_frame(
    number: signal.Signals, layered: Made, made: Made, start: Callable[..., House], expected: list[int], layered_expected: list[int]
) -> None:
    for one, tokens, bucket in ((made, expected, None), (layered, layered_expected, 8)):
        house = start(one.out / "cloud", *AT_ONCE)
        with Trip(one, house, bucket=bucket) as trip:
            frames = trip.count_messages(PROMPT, COUNT) // 2
            for frame in range(frames):
                house = check_blow(number, frame, trip, house, lambda: start(one.out / "cloud", *AT_ONCE), tokens)  # noqa: B023


# Leases


def test_a_lease_that_runs_out_frees_the_slot_and_the_session_is_replayed(
    made: Made, start: Callable[..., House], expected: list[int]
) -> None:
    """There is one slot: a second session could not begin before the first is over."""
    house = start(made.out / "cloud", "--lease-seconds", "0.3", "--sessions", "1")
    with Trip(made, house) as trip:
        assert trip.session.terms.lease_millis == 300
        first, begun = trip.id, house.taken
        for index in (3, 40):
            start_of_cut = house.now

            def wait(state: str, after: int = start_of_cut) -> None:
                if state == RECONNECTING:
                    threading.Thread(target=lambda: (house.wait("no connection for 0.3 s, its lease", after), trip.lead_to(house))).start()

            trip.on_state = wait
            trip.lead_to(None)
            trip.cut_at(index, "reset", True)
            trip.states.clear()
            assert trip.whole(PROMPT, COUNT) == expected
            assert trip.states[:2] == [RECONNECTING, CONNECTED]
            assert (REPLAYING in trip.states) == (index == 40)
        assert trip.id != first
        house.wait_until(lambda: house.sessions == 1)
        with pytest.raises(ServerFull):
            open_session(trip.edge, house.address)
    house.wait_until(lambda: house.sessions == 0)
    assert house.taken == begun + 2


@pytest.mark.usefixtures("unhurried")
def test_without_leases_a_cut_is_a_replay(made: Made, start: Callable[..., House], expected: list[int]) -> None:
    house = start(made.out / "cloud", "--lease-seconds", "0")
    with Trip(made, house) as trip:
        for index, kind in ((5, "reset"), (30, "reset"), (41, "reset")):
            before = trip.id
            trip.cut_at(index, kind, True)
            assert trip.whole(PROMPT, COUNT) == expected
            assert trip.id != before
            house.wait_until(lambda: house.sessions == 1)
        assert trip.session._link.reconnections == 3


def greet(address: str, machine: DeviceSession, **changes: Any) -> pb.Frame:
    """What a cloud answers to whoever wants to go on with a session."""
    frame = pb.Frame.FromString(machine.hello())
    frame.received = changes.pop("received", 0)
    for name, value in changes.items():
        setattr(frame.hello, name, value)

    async def ask() -> pb.Frame:
        async with raw(address) as call:
            await call.write(frame.SerializeToString())
            return pb.Frame.FromString(await call.read())

    return asyncio.run(ask())


@pytest.mark.usefixtures("unhurried")
def test_another_device_cannot_take_a_session(made: Made, house: House, expected: list[int]) -> None:
    """By a guessed id, by another contract, precision or count of frames: refused by name, and the real device notices nothing."""
    with Trip(made, house) as trip:
        stream = trip.session.stream(PROMPT, trip.session.sampling(max_tokens=COUNT, temperature=0.0))
        got = [next(stream).token_id]
        real, received = trip.id, trip.session._link.machine.received
        half = DeviceSession(trip.session.edge.plan, trip.session.edge.shape, machine_of(made).contract.hex(), Precision(entry="fp16"))
        for code, machine, changes in (
            (pb.EXPIRED, machine_of(made), {"session": bytes(16)}),
            (pb.EXPIRED, machine_of(made), {"session": real[:-1] + bytes([real[-1] ^ 1])}),
            (pb.BAD_FRAME, machine_of(made), {"session": real[:-1]}),
            (pb.BAD_FRAME, machine_of(made), {"session": real, "received": received + 1}),
            (pb.BAD_FRAME, machine_of(made), {"session": real, "received": 2**64 - 1}),
            (pb.BAD_FRAME, machine_of(made), {"session": real, "received": 0}),
            (pb.WRONG_CONTRACT, machine_of(made), {"session": real, "contract": bytes(32)}),
            (pb.WRONG_DTYPE, half, {"session": real}),
        ):
            fault = greet(house.address, machine, **changes).fault
            assert pb.FaultCode.Name(fault.code) == pb.FaultCode.Name(code), (changes, fault.detail)
            got.append(next(stream).token_id) if len(got) < COUNT else None
        assert got == expected
        assert (trip.id, trip.states, trip.session._link.reconnections) == (real, [], 0)


@pytest.mark.usefixtures("unhurried")
def test_a_session_is_taken_over_from_a_connection_that_seems_alive(made: Made, house: House, expected: list[int]) -> None:
    """By whoever knows its id: the connection before it ends, and the device takes the session back by the same right."""
    with Trip(made, house) as trip:
        stream = trip.session.stream(PROMPT, trip.session.sampling(max_tokens=COUNT, temperature=0.0))
        got = [next(stream).token_id]
        for _ in range(2):
            after = house.now
            welcome = greet(house.address, machine_of(made), session=trip.id, received=trip.session._link.machine.received)
            assert welcome.welcome.session == trip.id
            house.wait("session taken up again", after)
            got.append(next(stream).token_id)
        got += [piece.token_id for piece in stream]
        assert got == expected
        assert trip.session._link.reconnections == 2
        assert trip.session._stepper.counters.replayed_tokens == 0


@pytest.mark.usefixtures("unhurried")
def test_two_devices_and_one_of_them_is_cut(made: Made, house: House, expected: list[int]) -> None:
    with Trip(made, house) as cut, Trip(made, house) as other:
        for index in range(0, 48, 7):
            cut.session.forget()
            other.session.forget()
            cut.cut_at(index, "reset", index % 2 == 0)
            streams = [one.session.stream(PROMPT, one.session.sampling(max_tokens=COUNT, temperature=0.0)) for one in (cut, other)]
            assert [tuple(piece.token_id for piece in pair) for pair in zip(*streams, strict=True)] == [(one, one) for one in expected]
        assert cut.session._link.reconnections > 0
        assert (other.session._link.reconnections, other.states) == (0, [])


def test_a_peer_that_never_reads_loses_its_connection_and_keeps_its_session(made: Made, start: Callable[..., House]) -> None:
    house = start(made.out / "cloud", write_seconds=0.3)

    async def run() -> None:
        machine = machine_of(made)
        async with raw(house.address) as call:
            await call.write(machine.hello())
            machine.receive(await call.read())
            for number in range(32):  # of a megabyte each, which nobody reads
                await call.write(machine.ping(number, 0, 1 << 20))
            await asyncio.to_thread(house.wait, "connection lost, the session waits")
        async with raw(house.address) as call:
            await call.write(machine.hello_again())
            assert machine.welcomed_back(await call.read()) == []
            await call.write(machine.ping(99))
            machine.receive(await call.read())
            await call.write(machine.close())
            machine.receive(await call.read())

    asyncio.run(run())
    house.wait_until(lambda: house.sessions == 0)


# Giving up, and Ctrl-C


def test_given_up_and_taken_up_again_later(made: Made, house: House, expected: list[int]) -> None:
    """The error says for how long was tried; the same object serves once the cloud is back, whether it knows the session still or not."""
    with Trip(made, house, deadlines=replace(PATIENT, give_up_seconds=0.2)) as trip:
        for index, kind in ((4, "reset"), (25, "silence"), (44, "reset")):
            trip.lead_to(None)
            trip.cut_at(index, kind, index % 2 == 0)
            with pytest.raises(Unreachable, match=r"tried for 0\.2 s to go on"):
                trip.whole(PROMPT, COUNT)
            with pytest.raises(Unreachable, match=r"the session was given up; tried for 0\.2 s"):
                answer(trip.session, PROMPT, COUNT)
            trip.lead_to(house)
            assert answer(trip.session, PROMPT, COUNT) == expected
            assert trip.session.state == CONNECTED


@pytest.mark.parametrize("kind", ["reset", "silence"])
def test_ctrl_c_while_the_link_is_down(kind: str, made: Made, house: House, expected: list[int]) -> None:
    """The cloud is away for as long as it takes, and nobody waits for it; the session goes on afterwards where it was."""
    with Trip(made, house) as trip:
        first = trip.id
        for index in (1, 8, 20, 31, 45):

            def press(state: str) -> None:
                if state == RECONNECTING:
                    signal.raise_signal(signal.SIGINT)

            trip.on_state = press
            trip.lead_to(None)
            trip.cut_at(index, kind, index % 2 == 0)
            trip.session.forget()
            with pytest.raises(KeyboardInterrupt):
                answer(trip.session, PROMPT, COUNT)
            trip.on_state = lambda state: None
            trip.lead_to(house)
            assert answer(trip.session, PROMPT, COUNT) == expected
        assert trip.id == first
        assert trip.session._stepper.counters.replayed_tokens == 0


def test_ctrl_c_while_a_session_is_replayed(made: Made, house: House, second: House, expected: list[int]) -> None:
    with Trip(made, house) as trip:
        for index, place in ((18, second), (39, house), (28, second)):

            def press(state: str) -> None:
                if state == REPLAYING:
                    signal.raise_signal(signal.SIGINT)

            trip.on_state = press
            trip.lead_to(place)
            trip.cut_at(index, "reset", True)
            trip.session.forget()
            with pytest.raises(KeyboardInterrupt):
                answer(trip.session, PROMPT, COUNT)
            trip.on_state = lambda state: None
            assert answer(trip.session, PROMPT, COUNT) == expected


def test_closing_while_the_link_is_down(made: Made, house: House) -> None:
    """Says nothing, waits for nobody."""
    with Trip(made, house, deadlines=replace(PATIENT, give_up_seconds=0.1)) as trip:
        trip.lead_to(None)
        trip.cut_at(9, "reset", True)
        with pytest.raises(Unreachable):
            answer(trip.session, PROMPT, COUNT)


# Negative controls


def test_without_sending_again_the_answer_is_lost(made: Made, house: House, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "after", lambda self, count: [])
    with Trip(made, house, deadlines=Deadlines(step_seconds=1.0, give_up_seconds=1.0)) as trip:
        trip.cut_at(1, "reset", False)
        with pytest.raises(PloraError):
            trip.whole(PROMPT, COUNT)


def test_a_replay_that_skips_a_token_is_another_answer(
    made: Made, house: House, second: House, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stepper._begin_anew

    async def skip(self: Stepper, tokens: list[int], why: str) -> None:
        await real(self, [*tokens[:3], *tokens[4:]], why)
        self.history = tokens[:]

    monkeypatch.setattr(Stepper, "_begin_anew", skip)
    with Trip(made, house, bucket=8) as trip:
        assert trip.whole(PROMPT, COUNT) == expected
        trip.lead_to(second)
        trip.logits.clear()
        trip.cut_at(40, "reset", True)
        trip.session.forget()
        with pytest.raises((PloraError, AssertionError)):
            assert answer(trip.session, PROMPT, COUNT) == expected
