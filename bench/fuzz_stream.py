"""Fuzz target: a whole session between a hostile device and a cloud's machine, over connections that break."""

from __future__ import annotations

from collections.abc import Callable

from plora.artifact.errors import RemoteProtocolError
from plora.protocol import CloudSession
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import CancelAsked, CloseAsked, Greeting, InjectionsArrived, StepBegun, Truncated
from plora.protocol.states import State

from .fuzz_frames import HIDDEN, Choices, any_setting, any_terms, check, hello, spoil, values
from .fuzz_machines import MOST_FRAMES, hear, state_of
from .fuzz_rules import Rules, good_hello


def stream(data: bytes) -> int:
    """A hostile device, one cloud's machine, connections that break. Everything that the device says has a verdict beforehand."""
    choices = Choices(data)
    own = any_setting(choices)
    terms = any_terms(choices, own)
    cloud = CloudSession(own.plan, own.shape, own.hash)
    check(isinstance(hear(cloud, hello(own).SerializeToString()), Greeting), "a plain hello is accepted")
    cloud.welcome(terms)
    rules, frames = Rules(own, terms), 1
    said: list[bytes] = []
    logged: list[bytes] = []  # the cloud's numbered frames
    while choices.left > 0 and frames < MOST_FRAMES and cloud.state is not State.OVER:
        frames += 1
        if terms.lease_millis and choices.seldom(32):
            greet_again(choices, rules, cloud, said, logged)
            continue
        frame = rules.move(choices, rules.sent - choices.below(2) if rules.sent else 0)
        data = spoil(choices, frame, said) if choices.seldom() else frame.SerializeToString()
        said.append(data)
        feed(rules, cloud, data)
        for _ in range(1 + choices.below(3)):  # several at once: mostly the cloud is as fast as the device
            if ways := rules.owed():
                speak(rules, cloud, *ways[choices.below(len(ways))], logged)
        agree(rules, cloud)
    return frames


def feed(rules: Rules, cloud: CloudSession, data: bytes) -> None:
    """One frame, and whether the machine's verdict is ours."""
    verdict, event = rules.verdict(data), hear(cloud, data)
    refused = isinstance(event, RemoteProtocolError)
    check(
        verdict is None or verdict is not refused,
        f"a frame that had to be {'accepted' if refused else 'refused'} became {type(event).__name__}",
    )
    if isinstance(event, RemoteProtocolError):
        cloud.fault(event.code, str(event))
        rules.pending = "over"
        return
    kind = rules.accept(data)
    expected = {"entry": StepBegun, "injections": InjectionsArrived, "truncate": Truncated, "cancel": CancelAsked, "close": CloseAsked}
    check(type(event) is expected.get(kind, type(event)), f"{kind} became {type(event).__name__}")
    if isinstance(event, CancelAsked):
        check(event.length == rules.positions[event.step], "what a cancel leaves")


def speak(rules: Rules, cloud: CloudSession, kind: str, step: int, logged: list[bytes]) -> None:
    """The cloud says one of what it owes."""
    calls: dict[str, Callable[[], bytes]] = {
        "compressed": lambda: cloud.compressed(
            values(rules.flight(step).tokens, rules.own.plan.exchanges[rules.flight(step).progress // 2].compressed_columns), step
        ),
        "exit": lambda: cloud.exit(values(rules.flying[0].exit_rows, HIDDEN)),
        "cancelled": cloud.cancelled,
        "closed": cloud.closed,
    }
    try:
        logged.append(calls[kind]())
    except RemoteProtocolError as error:
        check(rules.overflows, f"the cloud could not say {kind}: {error}")
        cloud.fault(error.code, str(error))
        rules.pending = "over"
    else:
        check(not rules.overflows, "the cloud keeps more frames than it may")
        rules.said(kind, step)


def greet_again(choices: Choices, rules: Rules, cloud: CloudSession, said: list[bytes], logged: list[bytes]) -> None:
    """Another connection for the session: what the device lacks comes again, byte for byte."""
    frame = hello(rules.own, rules.terms.session, rules.sent - choices.below(4) % (rules.sent - rules.acknowledged + 1))
    data = spoil(choices, frame, said) if choices.seldom(4) else frame.SerializeToString()
    door = CloudSession(rules.own.plan, rules.own.shape, rules.own.hash)
    event = hear(door, data)
    check(good_hello(rules.own, data) == isinstance(event, Greeting), f"the door made {type(event).__name__} of a greeting")
    if not isinstance(event, Greeting) or event.session != rules.terms.session:
        return
    legal = rules.acknowledged <= event.received <= rules.sent and event.precision == rules.terms.precision and rules.pending != "over"
    before = state_of(cloud)
    try:
        welcome, *lacking = cloud.welcome_back(event)
    except RemoteProtocolError as error:
        check(not legal, f"a session that may be taken up was refused: {error}")
        check(state_of(cloud) == before, "a greeting that was refused leaves no trace")
        return
    check(legal, f"a session was taken up by a device that received {event.received} of {rules.acknowledged}..{rules.sent}")
    check(pb.Frame.FromString(welcome).received == rules.heard, "the cloud says how many frames it has")
    check(lacking == logged[event.received :], "what the device lacks comes again, byte for byte")
    rules.acknowledged = event.received


def agree(rules: Rules, cloud: CloudSession) -> None:
    """The machine stands where the rules say."""
    if cloud.state is State.OVER:
        check(rules.pending == "over", "a session ended that kept the rules")
        return
    stands = [(step.number, step.position, step.tokens, step.exit_rows, step.progress) for step in cloud.steps]
    flying = [(flight.number, flight.position, flight.tokens, flight.exit_rows, flight.progress) for flight in rules.flying]
    if not rules.pending:
        check((cloud.length, cloud.step, stands) == (rules.length, rules.step, flying), f"{cloud.length}, {stands}, expected {flying}")
    check((cloud.received, cloud.outbox.sent) == (rules.heard, rules.sent), "both sides count frames alike")
