"""Two machines joined without a network: for tests, for conformance vectors, and to read how a session goes."""

from __future__ import annotations

from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from .events import Event
from .precision import Precision
from .roles import CloudSession, DeviceSession


class Loopback:
    """A device's and a cloud's machine. `to_cloud` and `to_device` deliver one frame and return the event; `transcript`
    keeps (sender, frame bytes) in order."""

    def __init__(self, plan: ExchangePlan, shape: DecoderShape, contract: str, precision: Precision = Precision()) -> None:  # noqa: B008  frozen
        self.device = DeviceSession(plan, shape, contract, precision)
        self.cloud = CloudSession(plan, shape, contract)
        self.transcript: list[tuple[str, bytes]] = []

    def to_cloud(self, data: bytes) -> Event:
        self.transcript.append(("device", data))
        return self.cloud.receive(data)

    def to_device(self, data: bytes) -> Event:
        self.transcript.append(("cloud", data))
        return self.device.receive(data)
