"""What a device meets now and then: slow prompts, refusals in a chat, odd bytes, Ctrl-C and other threads at a bad moment."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from plora.artifact.errors import QuotaReached, Unreachable, UsageError
from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.device_runtime import Access, PrivateSession, open_session
from plora.device_runtime.cli import main
from plora.device_runtime.stepper import Stepper
from plora.device_runtime.text import Text
from plora.device_runtime.transport import Transport
from plora.models.checkpoint import Base
from plora.protocol.events import Event

from .conftest import Made, answer, greedy

IDS = [5, 6, 7]


@pytest.fixture
def session(made: Made, served: str) -> Iterator[PrivateSession]:
    with open_session(made.out / "edge", served) as opened:
        yield opened


Run = Callable[..., Result]


@pytest.fixture
def run(made: Made, served: str) -> Iterator[Run]:
    """`plora-device` in this process; gives SIGTERM back as it was."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, given: str | bytes | None = None, cloud: str = served) -> Result:
        name, *rest = arguments
        return CliRunner().invoke(main, [name, "--edge", str(made.out / "edge"), "--cloud", cloud, *rest], input=given)

    yield run
    signal.signal(signal.SIGTERM, before)


# Deadlines


def before_events(session: PrivateSession, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], Any]) -> None:
    """The device awaits act(n) before it waits for its n-th event; pongs are none."""
    real, count = session._link.receive, [0]

    async def receive() -> Event:
        count[0] += 1
        await act(count[0])
        return await real()

    monkeypatch.setattr(session._link, "receive", receive)


def test_the_deadline_is_of_each_answer_and_not_of_the_prompt(
    session: PrivateSession, merged: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event takes 100 s by the device's clock; 120 s are allowed for a step, and the prompt is two of four round trips."""
    late = [0.0]

    async def delay(event: int) -> None:
        late[0] += 100
        await asyncio.sleep(0)

    monkeypatch.setattr(session._runner.loop, "time", lambda: time.monotonic() + late[0])
    before_events(session, monkeypatch, delay)
    prompt = list(range(2, 202))
    assert answer(session, prompt, 2) == greedy(merged, prompt, 2)
    assert late[0] >= 1000


def test_a_cloud_that_falls_silent_is_given_up_at_the_deadline(session: PrivateSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clock, the third event: by then one chunk's exchange was answered."""
    late = [0.0]

    async def vanish(event: int) -> None:
        if event == 3:
            late[0] = 121
            await asyncio.Event().wait()

    monkeypatch.setattr(session._runner.loop, "time", lambda: time.monotonic() + late[0])
    before_events(session, monkeypatch, vanish)
    with pytest.raises(Unreachable, match="no answer to step 1 within 120 s; given up"):
        answer(session, list(range(2, 202)), 2)


# Chats


@pytest.fixture
def refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step of a session is refused for its user's quota."""
    real, count = Stepper.feed, [0]

    async def feed(self: Stepper, *arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise QuotaReached("the cloud refused (QUOTA): no room", 1000)
        return await real(self, *arguments)

    monkeypatch.setattr(Stepper, "feed", feed)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_chat_outlives_a_refusal(terminal: bool, run: Run, refused_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line again is answered as if it were the first; a script learns of the refusal from the exit code."""
    flags = ("--max-tokens", "6", "--temperature", "0", "--no-speculate")
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: terminal, raising=False)
    result = run("chat", *flags, given="hello\nhello\n")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "QUOTA" in line and "those before it are kept" in line
    assert result.exit_code == (0 if terminal else QuotaReached.exit_code)
    expected = run("chat", *flags, given="hello\n")
    assert expected.exit_code == 0
    assert result.stdout.endswith(expected.stdout)


# Text that is none


def test_text_that_is_not_utf8_is_refused_by_both_encoders(made: Made) -> None:
    text = Text(made.out / "edge", read_manifest(EdgeManifest, made.out / "edge"))
    for odd, name in (("ab\udc80", "U\\+DC80 at character 3"), ("\ud83d", "U\\+D83D at character 1")):
        with pytest.raises(UsageError, match=name):
            text.encode_raw(odd)
        with pytest.raises(UsageError, match="not UTF-8 text"):
            text.encode_chat([{"role": "user", "content": odd}])


def test_odd_bytes_are_told_and_the_chat_goes_on(run: Run) -> None:
    flags = ("--max-tokens", "6", "--temperature", "0")
    expected = run("chat", *flags, given="hello\n")
    result = run("chat", *flags, given=b"caf\xe9\nhello\n")
    assert result.stderr.startswith("error: the prompt is not UTF-8 text") and "Traceback" not in result.stderr
    assert (result.exit_code, result.stdout[2:]) == (UsageError.exit_code, expected.stdout)
    prompted = run("generate", "--raw", "caf\udce9")
    assert (prompted.exit_code, prompted.stderr.count("\n")) == (UsageError.exit_code, 1)


def test_a_prompt_from_standard_input(run: Run) -> None:
    flags = ("--raw", "--json", "--max-tokens", "2", "--temperature", "0")
    given = run("generate", *flags, "-", given="pack my box\nwith é\n")
    assert given.exit_code == 0
    assert "prompt_token_ids" in given.stdout
    named = run("generate", *flags, "pack my box\nwith é")
    assert _ids(given) == _ids(named)
    assert "not UTF-8" in run("generate", *flags, "-", given=b"caf\xe9\n").stderr
    assert "standard input" in CliRunner().invoke(main, ["generate", "--help"]).stdout


def _ids(result: Result) -> str:
    return result.stdout.partition('"finish_reason"')[0]


# Settings


def test_a_sampling_flag_that_there_is_not_is_named(session: PrivateSession) -> None:
    with pytest.raises(UsageError, match="no sampling flag max_new_tokens, temprature; expected some of temperature, top_k, .*stop"):
        session.sampling(max_new_tokens=50, temprature=0.7)
    with pytest.raises(UsageError, match="eos_token_ids"):
        session.sampling(eos_token_ids=None)


@pytest.mark.parametrize("access", [Access(plaintext=True), Access(server_name="there"), Access()], ids=["plaintext", "tls", "plain"])
@pytest.mark.parametrize("address", ["myhost", "myhost:http", ":7070"])
def test_an_address_is_checked_however_the_cloud_is_known(address: str, access: Access) -> None:
    with pytest.raises(UsageError, match=f"--cloud {address}: expected HOST:PORT"):
        asyncio.run(access.channel(address, []))


# Other threads, and Ctrl-C


def test_reconnect_from_another_thread_while_an_answer_waits(
    session: PrivateSession, merged: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is ended by the thread that runs it, and by no other."""
    real, ended_by = Transport.fail, []

    def fail(self: Transport, why: str) -> None:
        ended_by.append(threading.current_thread())
        real(self, why)

    async def reconnect(event: int) -> None:
        if event == 3:
            thread = threading.Thread(target=session.reconnect)
            thread.start()
            thread.join()

    monkeypatch.setattr(Transport, "fail", fail)
    before_events(session, monkeypatch, reconnect)
    assert answer(session, IDS, 8) == greedy(merged, IDS, 8)
    assert session._link.reconnections == 1
    assert set(ended_by) == {threading.current_thread()}


def test_reconnect_between_answers_and_after_the_end(made: Made, served: str, merged: Base) -> None:
    with open_session(made.out / "edge", served) as session:
        session.reconnect()
        assert answer(session, IDS, 4) == greedy(merged, IDS, 4)
        assert session._link.reconnections == 1
    session.reconnect()


def test_ctrl_c_while_the_doctor_connects(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at once: nobody is there who could be asked to end in good order."""

    async def ready(self: Transport) -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(Transport, "_ready", ready)
    result = run("doctor")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")
    assert run("generate", "hello").exit_code == 130
