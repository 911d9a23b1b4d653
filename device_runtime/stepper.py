"""One step over the wire: front layers, entry, exchanges, exit, back layers. The device's half of the walk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..artifact.errors import PloraError, ProtocolError, RemoteProtocolError, Unreachable
from ..artifact.plan import Exchange
from ..artifact.walk import BackLayers, Entry, Exit, FrontLayers, walk
from ..protocol.events import CancelDone, ClosedDone, CompressedArrived, Opened, StepDone, Terms
from ..protocol.roles import DeviceSession
from ..protocol.states import State
from .cores import Floats
from .edge import Edge
from .layers import DeviceLayers
from .transport import Interrupted, Transport


@dataclass
class Counters:
    """Since the session began. round_trips: times that the device waited for the cloud; steps: with an exit."""

    steps: int = 0
    tokens: int = 0
    round_trips: int = 0


class Stepper:
    """Drives one session's machine over one transport. Not for two tasks at a time."""

    def __init__(self, edge: Edge, transport: Transport, dtype: str) -> None:
        self.edge = edge
        self.transport = transport
        self.machine = DeviceSession(edge.plan, edge.shape, edge.contract.hash, dtype)
        self.stages = walk(edge.plan)
        self.counters = Counters()
        self.layers: dict[FrontLayers | BackLayers, DeviceLayers] = {}

    async def open(self) -> Terms:
        """Handshake. Raises Refused's children, Unreachable."""
        async with self._deadline():
            await self.transport.send(self.machine.hello())
            event = await self._receive()
        assert isinstance(event, Opened)  # the machine lets nothing else through
        context = min(event.terms.context_tokens, self.edge.shape.context_tokens)
        for stage in self.stages:
            if isinstance(stage, FrontLayers | BackLayers):
                first = stage.first if isinstance(stage, BackLayers) else 0
                self.layers[stage] = self.edge.device_layers(first, stage.stop, context)
        return event.terms

    async def step(self, ids: list[int], exit_rows: int) -> Floats:
        """Feeds T new tokens; returns the last `exit_rows` rows of what the final norm reads, [exit_rows, hidden] float32."""
        async with self._deadline():  # one for the step: a timer per frame would be felt in every exchange
            return await self._walk(ids, exit_rows)

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        seconds = self.transport.deadlines.step_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise Unreachable(f"{self.transport.address}: no answer to step {self.machine.step} within {seconds:g} s; given up") from None

    async def _walk(self, ids: list[int], exit_rows: int) -> Floats:
        position = self.machine.length
        hidden = self.edge.embed(ids)
        for stage in self.stages:
            if isinstance(stage, FrontLayers | BackLayers):
                hidden = self.layers[stage].run(hidden, position)
            elif isinstance(stage, Entry):
                injection = self.edge.entry_injection(stage.exchange, hidden) if stage.exchange else None
                # Back layers need every token's row: each has a key and a value there.
                rows = len(ids) if self.edge.plan.back_layers else exit_rows
                await self.transport.send(self.machine.entry(hidden, rows, injection))
            elif isinstance(stage, Exchange):
                event = await self._receive()
                assert isinstance(event, CompressedArrived)
                await self.transport.send(self.machine.injections(self.edge.inject(stage, event.values)))
            elif isinstance(stage, Exit):
                event = await self._receive()
                assert isinstance(event, StepDone)
                hidden = event.hidden
        self.counters.steps += 1
        self.counters.tokens += len(ids)
        return hidden[len(hidden) - exit_rows :]

    async def truncate(self, length: int) -> None:
        await self.transport.send(self.machine.truncate(length))

    async def cancel(self) -> None:
        """After an interrupted step: the cloud's cache is as before it. Does nothing between steps.

        Raises Unreachable if the cloud does not confirm within close_seconds: the session is lost then.
        """
        self.transport.interrupted = False
        if self.machine.state not in (State.COMPUTING, State.WAITING):
            return
        seconds = self.transport.deadlines.close_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.transport.send(self.machine.cancel())
                while not isinstance(await self._receive(), CancelDone):
                    pass  # frames that crossed ours
        except TimeoutError:
            raise Unreachable(f"{self.transport.address}: a cancelled step was not confirmed within {seconds:g} s; given up") from None

    async def close(self) -> None:
        """Says good-bye if there is still somebody to say it to; never raises."""
        try:
            if self.machine.state not in (State.START, State.OVER):
                async with asyncio.timeout(self.transport.deadlines.close_seconds):
                    await self.transport.send(self.machine.close())
                    while not isinstance(await self._receive(), ClosedDone):
                        pass
        except (PloraError, TimeoutError, Interrupted):
            pass
        finally:
            await self.transport.close()

    async def _receive(self) -> object:
        """One event; tells the cloud before it gives up on it."""
        if self.machine.state in (State.GREETED, State.COMPUTING):
            self.counters.round_trips += 1
        try:
            data = await self.transport.receive()
        except Unreachable as error:
            raise Unreachable(f"{error} (step {self.machine.step}, {self.machine.length} tokens done)") from None
        try:
            return self.machine.receive(data)
        except RemoteProtocolError as error:
            await self.transport.send(self.machine.abort(error.code))
            raise RemoteProtocolError(f"the cloud broke the protocol: {error}", error.code) from None
        except ProtocolError:
            raise
