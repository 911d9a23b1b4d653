"""Fuzz targets without a service: the codec and the handshake; what must hold of a machine; and seeds for all targets."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
from google.protobuf.message import DecodeError

from plora.artifact.errors import ContextOverflow, Refused, RemoteProtocolError
from plora.protocol import CloudSession, DeviceSession, Loopback, Terms, tensors
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import (
    CancelAsked,
    CloseAsked,
    CompressedArrived,
    Event,
    Greeting,
    InjectionsArrived,
    Opened,
    PingArrived,
    StepBegun,
    StepDone,
)
from plora.protocol.limits import MAX_UNRECEIVED_FRAMES, WINDOW
from plora.protocol.session import Session
from plora.protocol.states import Role, State

from .fuzz_frames import HIDDEN, Choices, any_setting, any_terms, check, hello, setting, spoil, values
from .fuzz_rules import BYTES, good_hello, read, said_precision

CODES = frozenset(pb.FaultCode.keys())
MOST_FRAMES = 400
"""Of one input: a long one is cut."""


def state_of(machine: Session) -> tuple[object, ...]:
    """Everything that a refused frame must leave as it was."""
    steps = [(step.number, step.position, step.tokens, step.exit_rows, step.progress) for step in machine.steps]
    outbox = machine.outbox
    return machine.state, machine.terms, machine.length, machine.step, steps, machine.received, outbox.sent, outbox.kept


def hear(machine: Session, data: bytes) -> Event | RemoteProtocolError | None:
    """What a machine makes of bytes: an event, the error of a refusal that can be answered, or None for a fault that it was told."""
    before = state_of(machine)
    try:
        event = machine.receive(data)
    except RemoteProtocolError as error:
        check(error.code in CODES and str(error), f"a refusal with a name and a reason, got {error.code}: {error}")
        check(state_of(machine) == before, "a frame that was refused leaves no trace")
        return error
    except (Refused, ContextOverflow) as error:
        told = machine.role is Role.DEVICE and machine.state is State.OVER and read(data) is not None
        check(told, f"{type(error).__name__} comes of a fault alone")
        return None
    check_machine(machine)
    for name in ("hidden", "injection", "values"):
        if (got := getattr(event, name, None)) is not None:
            check_values(machine, event, name, got)
    return event


def check_machine(machine: Session) -> None:
    """Within its limits, whatever was said to it."""
    if terms := machine.terms:
        check(0 <= machine.length <= machine.end <= terms.context_tokens, f"tokens {machine.length}..{machine.end} within the context")
        check(len(machine.steps) <= terms.window <= WINDOW, f"{len(machine.steps)} steps in flight within the window")
    check(machine.outbox.kept <= MAX_UNRECEIVED_FRAMES, f"{machine.outbox.kept} frames kept")


def check_values(machine: Session, event: Event, name: str, got: tensors.Floats) -> None:
    """Of the type and shape that the plan says, and finite."""
    assert machine.terms is not None  # tensors come after the handshake
    columns = HIDDEN
    if isinstance(event, CompressedArrived):
        columns = event.exchange.compressed_columns
    elif isinstance(event, InjectionsArrived):
        columns = event.exchange.injection_columns
    elif name == "injection":
        assert machine.plan.entry_exchange is not None
        columns = machine.plan.entry_exchange.injection_columns
    check(got.dtype == np.float32 and got.ndim == 2 and got.shape[1] == columns, f"{name} of {got.dtype} {got.shape}")
    check(len(got) <= machine.terms.step_tokens, f"{name} of {len(got)} rows")
    check(np.isfinite(got).all(), f"{name} that was accepted is finite")


# The codec: any bytes as a frame


def answer(cloud: CloudSession, event: Event | RemoteProtocolError | None, terms: Terms) -> bytes | None:
    """What a cloud that keeps the rules says to an event; it ends the session after an error. None if nothing."""
    plan = cloud.plan
    try:
        match event:
            case RemoteProtocolError():
                return cloud.fault(event.code, str(event)) if cloud.state is not State.OVER else None
            case Greeting():
                return cloud.welcome(replace(terms, precision=event.precision))
            case StepBegun() | InjectionsArrived():
                step = next(step for step in cloud.steps if step.number == event.step)
                if step.exchange < len(plan.exchanges):
                    return cloud.compressed(values(step.tokens, plan.exchanges[step.exchange].compressed_columns), step.number)
                return cloud.exit(values(step.exit_rows, HIDDEN), 7)
            case CancelAsked():
                return cloud.cancelled()
            case CloseAsked():
                return cloud.closed()
            case PingArrived():
                return event.answer
    except RemoteProtocolError as error:
        check(cloud.outbox.kept == MAX_UNRECEIVED_FRAMES, f"sending fails for a full outbox alone: {error}")
        return cloud.fault(error.code, str(error))
    return None


def proceed(device: DeviceSession, event: Event | RemoteProtocolError | None, moves: Choices) -> list[bytes]:
    """What a device that keeps the rules says to an event."""
    match event:
        case RemoteProtocolError():
            return [device.abort(event.code)] if device.state is not State.OVER else []
        case CompressedArrived():
            tokens = next(step.tokens for step in device.steps if step.number == event.step)
            return [device.injections(values(tokens, event.exchange.injection_columns, 1), event.step)]
    if device.state not in (State.READY, State.COMPUTING, State.WAITING) or device.terms is None:
        return []
    terms, said = device.terms, []
    if device.outbox.kept > MAX_UNRECEIVED_FRAMES - 3:
        return []  # a cloud that acknowledges nothing gets nothing more
    if isinstance(event, StepDone) and moves.byte() % 8 == 7:
        return [device.cancel()]
    if isinstance(event, StepDone) and moves.byte() % 8 == 7 and not device.steps:
        said.append(device.truncate(device.length // 2))
    held = device.plan.entry_exchange
    while len(device.steps) < terms.window and device.outbox.kept < 4:
        position = device.end if device.steps or moves.byte() % 4 else device.end // 2
        tokens = min(1 + moves.byte() % 4, terms.step_tokens, terms.context_tokens - position)
        if tokens < 1:
            return [*said, device.close()]
        injection = values(tokens, held.injection_columns, 2) if held else None
        said.append(device.entry(values(tokens, HIDDEN, 3), moves.byte() % (tokens + 1), injection, position))
    return said


def codec(data: bytes) -> int:
    """Frames, each behind its length in two bytes, as they are: to a cloud's or a device's machine that goes on with whatever it accepts,
    and to the decoder of tensors."""
    choices = Choices(data)
    own, which = any_setting(choices), choices.byte()
    terms = any_terms(choices, own)
    moves = Choices(choices.take(choices.byte() % 16))
    cloud = CloudSession(own.plan, own.shape, own.hash)
    device = DeviceSession(own.plan, own.shape, own.hash, own.precision)
    device.hello()
    frames = 0
    while choices.left > 1 and frames < MOST_FRAMES:
        (length,) = struct.unpack("<H", choices.take(2))
        frame = choices.take(length)
        frames += 1
        decode_tensor(frame)
        if which % 2:
            if device.live:
                again(device, frame)
            proceed(device, hear(device, frame), moves)
        else:
            answer(cloud, hear(cloud, frame), terms)
            check_machine(cloud)
    return frames


def again(device: DeviceSession, data: bytes) -> None:
    """Bytes in place of the welcome on another connection leave the session as it was, but for what the cloud says it has."""
    before = state_of(device)
    device.hello_again()
    try:
        device.welcomed_back(data)
    except (RemoteProtocolError, Refused, ContextOverflow):
        check(state_of(device) == before, "a welcome that was refused leaves no trace")
    check(state_of(device)[:-1] == before[:-1], "a session taken up again stands where it stood")


def decode_tensor(data: bytes) -> None:
    """The bytes as one tensor of the shape that it claims."""
    try:
        tensor = pb.Tensor.FromString(data)
    except DecodeError:
        return
    for dtype in BYTES:
        try:
            got = tensors.decode(tensor, dtype, tensor.rows, tensor.columns, "fuzz")
        except RemoteProtocolError as error:
            check(error.code == "BAD_TENSOR", f"a tensor that was refused with {error.code}")
        else:
            check(got.shape == (tensor.rows, tensor.columns) and got.nbytes <= 4 * len(data), f"{got.shape} from {len(data)} bytes")
            check(got.dtype == np.float32 and np.isfinite(got).all(), "a tensor that was accepted is finite")


# The handshake


def handshake(data: bytes) -> int:
    """Greetings and greetings again on one connection after another, to one cloud; and the cloud's answers, spoiled too, to devices."""
    choices = Choices(data)
    own = any_setting(choices)
    terms = any_terms(choices, own)
    pairs: list[tuple[CloudSession, DeviceSession]] = []
    said: list[bytes] = []
    frames = 0
    while choices.left > 0 and frames < MOST_FRAMES:
        frames += 1
        move = choices.below(8)
        if move == 6 and pairs:
            frames += walk_step(pairs[choices.byte() % len(pairs)], choices)
            continue
        cloud, device = pairs[choices.byte() % len(pairs)] if pairs else (None, None)
        if move in (2, 3, 4) and cloud is not None and device is not None and cloud.terms is not None:
            frame = hello(own, cloud.terms.session, device.received)
        else:
            frame = hello(own, b"", 0, choices.byte() % 4 != 3, choices.byte() % 4 == 3, 3 - choices.byte() % 3)
        first = spoil(choices, frame, said) if choices.seldom(2) else frame.SerializeToString()
        said.append(first)
        door = CloudSession(own.plan, own.shape, own.hash)
        event = hear(door, first)
        check(good_hello(own, first) == isinstance(event, Greeting), f"the door made {type(event).__name__} of a greeting")
        if not isinstance(event, Greeting):
            continue
        if event.session:
            take_up(event, pairs, choices, said)
            continue
        opened = replace(terms, precision=event.precision, session=struct.pack("<QQ", len(pairs), 7))
        welcome = door.welcome(opened)
        asked = DeviceSession(own.plan, own.shape, own.hash, event.precision)
        asked.hello()
        if choices.seldom(2):
            frames += 1
            spoiled = spoil(choices, pb.Frame.FromString(welcome), said)
            opens = isinstance(hear(asked, spoiled), Opened)
            check(good_welcome(spoiled, event) == opens, f"a welcome that {'opens' if opens else 'does not open'} a session")
        else:
            check(isinstance(hear(asked, welcome), Opened), "a plain welcome opens")
            check(asked.terms == door.terms, "both sides go by the same terms")
            pairs.append((door, asked))
    return frames


def good_welcome(data: bytes, asked: Greeting) -> bool:
    frame = read(data)
    if frame is None or frame.WhichOneof("kind") != "welcome" or frame.received:
        return False
    said = frame.welcome
    return said_precision(said) == asked.precision and len(said.session) == 16 and said.context_tokens > 0 and said.step_tokens > 0


def take_up(greeting: Greeting, pairs: list[tuple[CloudSession, DeviceSession]], choices: Choices, said: list[bytes]) -> None:
    """A session is taken up again exactly if it is there, has a lease, and the numbers and dtypes are right."""
    found = [pair for pair in pairs if pair[0].terms is not None and pair[0].terms.session == greeting.session]
    if not found:
        return  # the service's business
    cloud, device = found[0]
    assert cloud.terms is not None
    before, kept = state_of(cloud), cloud.outbox.kept
    least = cloud.outbox.sent - kept
    legal = cloud.live and cloud.terms.lease_millis > 0 and least <= greeting.received <= cloud.outbox.sent
    legal = legal and greeting.precision == cloud.terms.precision
    try:
        welcome, *lacking = cloud.welcome_back(greeting)
    except RemoteProtocolError as error:
        check(not legal and error.code in CODES, f"a session that may be taken up was refused: {error}")
        check(state_of(cloud) == before, "a greeting that was refused leaves no trace")
        return
    check(legal, f"a session was taken up by a device that received {greeting.received} of {least}..{cloud.outbox.sent}")
    check(len(lacking) == cloud.outbox.sent - greeting.received, "what the device lacks is sent again")
    check(state_of(cloud)[:-1] == before[:-1], "a session taken up again stands where it stood")
    if device.live and greeting.received == device.received:
        again(device, spoil(choices, pb.Frame.FromString(welcome), said) if choices.seldom(2) else welcome)
        for frame in lacking:
            check(not isinstance(hear(device, frame), RemoteProtocolError), "what is sent again is good")


def walk_step(pair: tuple[CloudSession, DeviceSession], choices: Choices) -> int:
    """A few frames both ways between two that keep the rules; what the cloud says last may be lost."""
    cloud, device = pair
    if cloud.state is not device.state or device.state not in (State.READY, State.COMPUTING, State.WAITING) or cloud.terms is None:
        return 0
    if (cloud.outbox.sent, device.outbox.sent) != (device.received, cloud.received):
        return 0  # frames were lost
    frames, up = 0, proceed(device, None, choices)
    for _ in range(choices.below(12)):
        if not up:
            break
        frames += 1
        down = answer(cloud, hear(cloud, up.pop(0)), cloud.terms)
        if down is not None:
            if choices.seldom(8):
                break  # lost, and all behind it
            up += proceed(device, hear(device, down), choices)
    return frames


# Seeds


def transcripts() -> list[tuple[int, list[tuple[str, bytes]]]]:
    """Whole sessions between two that keep the rules: which setting, and (sender, frame)."""
    made = []
    for which in range(16):
        own = setting(which % 4, which // 4)
        wire = Loopback(own.plan, own.shape, own.hash, own.precision)
        terms = Terms(own.precision, 160, 40, 60_000, b"s" * 16, 60_000, 4)
        moves = Choices(bytes(np.random.default_rng(which).integers(0, 256, 400, np.uint8)))
        up = [wire.device.hello()]
        for _ in range(24):
            if not up:
                break
            down = answer(wire.cloud, wire.to_cloud(up.pop(0)), terms)
            if down is not None:
                up += proceed(wire.device, wire.to_device(down), moves)
        made.append((which, wire.transcript))
    return made


def packed(frames: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(frame)) + frame for frame in frames)


def codec_seeds() -> list[bytes]:
    """Transcripts as heard by either side. The moves of the device are those of an input without choices, so not all fit: enough do."""
    seeds = []
    for which, transcript in transcripts():
        for side, sender in enumerate(("device", "cloud")):
            seeds.append(bytes([which, side, 0, 0]) + packed([frame for who, frame in transcript if who == sender]))
    return seeds


def choice_seeds() -> list[bytes]:
    """Inputs that are read as choices: plain ones, and random ones of several lengths."""
    generator = np.random.default_rng(0)
    seeds = [bytes([which]) + bytes(length) for which in range(16) for length in (40, 160)]
    for length in (30, 100, 300):
        for which in range(16):
            seeds.append(bytes([which]) + bytes(generator.integers(0, 256, length, np.uint8)))
            seeds.append(bytes([which]) + bytes(generator.integers(0, 180, length, np.uint8)))
    return seeds
