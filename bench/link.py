"""A network link on loopback: a TCP relay with delay, jitter, rates and cuts, that counts bytes and gRPC messages. docs/links.md.

In process: `with Link("127.0.0.1:50051", profile("5g")) as link: … link.address …`. As a process of its own, which shares no
interpreter lock with what it carries: `with link_process(target, profile) as link`, or by hand

    python -m bench.link TARGET --profile 5g [--rtt 20]

which prints its address, then answers each line on stdin (`counters`, `cut silence 0.5`, `cut reset 0.5`, `stall 1`,
`cut-at-message 7 silence 0.5 delivered`) with one line of JSON; the end of input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import json
import math
import select
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from plora.artifact.errors import PloraError, UsageError

from .conditions import ROOT
from .profiles import PROFILES, Cuts, Profile, profile
from .relay import SOCKET_BUFFER_BYTES, Connection, reset
from .shaper import LinkClock, Messages, Shaper

T = TypeVar("T")
KINDS = ("reset", "silence")
RESET_AFTER_SECONDS = 0.05
"""From a message at which the link is cut by reset to the RST: the ends shall have read what came before; gRPC drops what it has not."""
CALL_SECONDS = 10.0
"""For a command to the link's thread, and for the thread or process to end."""
PR_SET_TIMERSLACK = 29
"""prctl(2): the kernel may delay this thread's timers by 50 us otherwise."""


class FineSelector(selectors.EpollSelector):
    """epoll rounds a wait up to whole milliseconds, select does not: it waits for the epoll itself."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


@dataclass(frozen=True)
class Counters:
    """What has crossed, that is, come out at the far end: TCP payload bytes and whole gRPC messages, from (up) and to (down) the
    device; connections taken; cuts begun, stalls not among them."""

    up_bytes: int = 0
    down_bytes: int = 0
    up_messages: int = 0
    down_messages: int = 0
    connections: int = 0
    cuts: int = 0


@dataclass(frozen=True)
class CutAtMessage:
    index: int
    kind: str
    seconds: float
    deliver: bool


class Link:
    """Listens on a free loopback port and relays to `target` (host:port) as `profile` says. Its commands are for any thread and
    return when they have taken effect; cut and stall return when the link will be back (time.perf_counter), which is
    `restored_at`, too. Cuts and stalls that overlap prolong one another. seed: of the jitter.
    """

    def __init__(self, target: str, profile: Profile, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UsageError(f"link to {target!r}: need HOST:PORT")
        self.target = (socket.gethostbyname(host), int(port))
        self.profile = profile
        self.clock = LinkClock()
        delay, jitter = profile.rtt_millis / 2e3, profile.jitter_millis / 1e3
        self.shapers = {
            "up": Shaper(profile.up_mbits, delay, jitter, f"{seed} up"),
            "down": Shaper(profile.down_mbits, delay, jitter, f"{seed} down"),
        }
        self.silences = 0
        self._silent_until = self._reset_until = -math.inf
        self._restored_at: float | None = None
        self._bytes = {"up": 0, "down": 0}
        self._messages = {"up": 0, "down": 0}
        self._taken = 0
        self._cuts = 0
        self._armed: CutAtMessage | None = None
        self._connections: set[Connection] = set()
        self._errors: list[BaseException] = []

    @property
    def restored_at(self) -> float | None:
        """When the link comes or came back from all cuts and stalls so far, as time.perf_counter() has it; None before the first."""
        return self._restored_at

    def counters(self) -> Counters:
        return Counters(self._bytes["up"], self._bytes["down"], self._messages["up"], self._messages["down"], self._taken, self._cuts)

    def cut(self, kind: str, seconds: float) -> float:
        """reset: RST to both sides of every connection, and to new ones until it is over. silence: what is under way is lost, and
        every connection stays dead for ever, as when a phone changes network; neither side is told anything. A connection made
        during the silence is accepted by the kernel, but its SYN is lost and sent again at SYN_RETRY_SECONDS: it works from then."""
        _check_cut(kind, seconds)
        return self._call(lambda: self.begin_cut(kind, seconds))

    def stall(self, seconds: float) -> float:
        """Nothing moves and nothing is lost."""
        _check_seconds(seconds)
        return self._call(lambda: self._back(self.clock.stall(self.loop.time(), seconds)))

    def cut_at_message(self, index: int, kind: str, seconds: float, *, deliver: bool) -> None:
        """A cut when gRPC message `index` comes out of the link, counted from 0 over both directions and all connections of this link.
        deliver: it still reaches the far end, whole, and nothing after it does; else all reaches it but the message's last byte, and
        it is not counted. A cut by reset loses the rest at once and sends its RSTs RESET_AFTER_SECONDS later. Replaces one that has
        not happened yet."""
        _check_cut(kind, seconds)
        self._call(lambda: self._arm(CutAtMessage(index, kind, seconds, deliver)))

    def _arm(self, cut: CutAtMessage) -> None:
        if cut.index < self._message_count():
            raise UsageError(f"cut at message {cut.index}: {self._message_count()} have crossed already")
        self._armed = cut

    def __enter__(self) -> Link:
        """From here on there is `address`, host:port."""
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self.listener.setblocking(False)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.loop = asyncio.SelectorEventLoop(FineSelector())
        self.loop.set_exception_handler(self._failed)
        self.thread = threading.Thread(target=self._run, name="link", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(CALL_SECONDS)
        if self.thread.is_alive():
            raise RuntimeError(f"the link's thread did not end within {CALL_SECONDS:g} s")
        if self._errors and error is None:
            raise RuntimeError("the link failed") from self._errors[0]

    def _call(self, function: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return answer.result(CALL_SECONDS)

    # Below: in the loop's thread.

    def _run(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self.loop.add_reader(self.listener, self._accept)
        if self.profile.cuts is not None:
            self.loop.call_later(self.profile.cuts.every_seconds, self._cut_again, self.profile.cuts)
        try:
            self.loop.run_forever()
            self.loop.remove_reader(self.listener)
            opening = [connection.opening for connection in self._connections]
            for connection in list(self._connections):
                connection.close()
            if opening:
                self.loop.run_until_complete(asyncio.wait(opening))
                self._errors += [error for task in opening if not task.cancelled() and (error := task.exception())]
        except BaseException as error:
            self._errors.append(error)
        finally:
            self.listener.close()
            self.loop.close()

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._errors.append(context.get("exception") or RuntimeError(context["message"]))

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return  # it left before we came
        client.setblocking(False)
        self._taken += 1
        if self.loop.time() < self._reset_until:
            reset(client)
        else:
            self._connections.add(Connection(self, client))

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def link_time(self) -> float:
        return self.clock.link_time(self.loop.time())

    def silent(self) -> bool:
        return self.loop.time() < self._silent_until

    def begin_cut(self, kind: str, seconds: float, at_message: bool = False) -> float:
        """at_message: nothing moves any more, but RSTs wait until both ends have read what they were sent."""
        end = self.loop.time() + seconds
        back = self._back(end)  # whoever sees the cut sees this, too
        self._cuts += 1
        if kind == "silence":
            self._silent_until = max(self._silent_until, end)
            self.silences += 1
        else:
            self._reset_until = max(self._reset_until, end)
        for shaper in self.shapers.values():
            shaper.drop(self.link_time())
        for connection in list(self._connections):
            if kind == "silence":
                connection.silence()
            elif at_message and connection.directions:
                connection.silence()
                self.loop.call_later(RESET_AFTER_SECONDS, connection.reset)
            else:
                connection.reset()
        return back

    def _back(self, at: float) -> float:
        self._restored_at = max(at, self._restored_at or at)  # the loop's clock is perf_counter's on Linux: CLOCK_MONOTONIC
        return self._restored_at

    def _cut_again(self, cuts: Cuts) -> None:
        self.loop.call_later(cuts.every_seconds, self._cut_again, cuts)
        self.begin_cut("silence", cuts.lasting_seconds)

    def _message_count(self) -> int:
        return self._messages["up"] + self._messages["down"]

    def crossing(self, way: str, messages: Messages, data: bytes) -> tuple[bytes, CutAtMessage | None]:
        """What of `data` may be delivered, counted, and the cut that it brings about."""
        ends, cut = messages.feed(data), self._armed
        if cut is not None and cut.index < self._message_count() + len(ends):
            end = ends[cut.index - self._message_count()]
            data = data[: end if cut.deliver else end - 1]
            ends = [one for one in ends if one <= len(data)]
            self._armed = None
        else:
            cut = None
        self._bytes[way] += len(data)
        self._messages[way] += len(ends)
        return data, cut


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise UsageError(f"a link down for {seconds:g} s: need 0 or more")


def _check_cut(kind: str, seconds: float) -> None:
    if kind not in KINDS:
        raise UsageError(f"no cut {kind!r}: there are {', '.join(KINDS)}")
    _check_seconds(seconds)


class LinkProcess:
    """The same commands for a link in a process of its own."""

    address: str
    """Where it listens, host:port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self.address = self._line()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def restored_at(self) -> float | None:
        return self._ask("counters")["restored_at"]

    def counters(self) -> Counters:
        return Counters(**{key: value for key, value in self._ask("counters").items() if key != "restored_at"})

    def cut(self, kind: str, seconds: float) -> float:
        return self._ask(f"cut {kind} {seconds}")["restored_at"]

    def stall(self, seconds: float) -> float:
        return self._ask(f"stall {seconds}")["restored_at"]

    def cut_at_message(self, index: int, kind: str, seconds: float, *, deliver: bool) -> None:
        self._ask(f"cut-at-message {index} {kind} {seconds} {'delivered' if deliver else 'lost'}")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: the next line says with what
            answer = json.loads(self._line())
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline().strip():
            return line
        raise RuntimeError(f"the link process ended with {self._process.wait(CALL_SECONDS)}")


@contextmanager
def link_process(target: str, profile: Profile, seed: int = 0) -> Iterator[LinkProcess]:
    """Gone when the block ends; if this process dies, it sees the end of its input and goes, too."""
    command = [sys.executable, "-m", "bench.link", target, "--profile", json.dumps(dataclasses.asdict(profile)), "--seed", str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield LinkProcess(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(CALL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def answer(link: Link, line: str) -> dict[str, Any]:
    """Does what a line of input says; the answer is the state after it, or an error."""
    try:
        match line.split():
            case ["counters"]:
                pass
            case ["cut", kind, seconds]:
                link.cut(kind, float(seconds))
            case ["stall", seconds]:
                link.stall(float(seconds))
            case ["cut-at-message", index, kind, seconds, ("delivered" | "lost") as fate]:
                link.cut_at_message(int(index), kind, float(seconds), deliver=fate == "delivered")
            case _:
                raise UsageError(f"no command {line.strip()!r}: there are counters, cut, stall, cut-at-message")
    except (PloraError, ValueError) as error:
        return {"error": str(error)}
    return {"restored_at": link.restored_at, **dataclasses.asdict(link.counters())}


def _profile(text: str) -> Profile:
    """A name, or the fields as a JSON object."""
    if not text.startswith("{"):
        return profile(text)
    fields = json.loads(text)
    return Profile(**{**fields, "cuts": fields["cuts"] and Cuts(**fields["cuts"])})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.link", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", metavar="TARGET", help="host:port")
    parser.add_argument("--profile", default="loopback", help=f"{', '.join(PROFILES)}, or a profile's fields as a JSON object")
    parser.add_argument("--rtt", type=float, metavar="MILLIS", help="instead of the profile's")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    arguments = parser.parse_args()
    try:
        one = _profile(arguments.profile)
        one = one if arguments.rtt is None else one.with_rtt(arguments.rtt)
        with Link(arguments.target, one, arguments.seed) as link:
            print(link.address, flush=True)
            for line in sys.stdin:
                print(json.dumps(answer(link, line)), flush=True)
    except UsageError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
