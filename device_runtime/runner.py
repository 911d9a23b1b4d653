"""Runs coroutines from synchronous code, one at a time, with a Ctrl-C that cancels cleanly."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..artifact.console import interrupt
from .transport import Interrupted

T = TypeVar("T")

LAST_WORDS_SECONDS = 0.01
"""grpc tells the loop of operations that ended with their channel a moment later, and complains on standard error if it is gone."""


class Runner:
    """As asyncio.Runner, whose per-run signal handling prints the repr of every result on Python 3.11: 5 ms for a tensor.

    In the main thread, while a coroutine runs, the first SIGINT (or SIGTERM, in a command of ours) calls `on_interrupt`, so that it
    can end in good order; the second cancels it. Either way `run` raises KeyboardInterrupt once the coroutine has ended.
    """

    def __init__(self, on_interrupt: Callable[[], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self.on_interrupt = on_interrupt
        self.task: asyncio.Task[Any] | None = None
        self.interrupted = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        self.task = self.loop.create_task(work)
        self.interrupted = False
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: interrupt}
        main = threading.current_thread() is threading.main_thread()
        ours = {number: usual for number, usual in handlers.items() if main and signal.getsignal(number) is usual}
        for number in ours:
            signal.signal(number, self._on_signal)
        try:
            result = self.loop.run_until_complete(self.task)
        except (asyncio.CancelledError, Interrupted):
            if self.interrupted:
                raise KeyboardInterrupt from None
            raise
        finally:
            self.task = None
            for number, usual in ours.items():
                signal.signal(number, usual)
        if self.interrupted:  # it came as the coroutine ended, and is not to be lost
            raise KeyboardInterrupt
        return result

    def _on_signal(self, number: int, frame: Any) -> None:
        again, self.interrupted = self.interrupted, True
        if self.task is not None:
            self.loop.call_soon_threadsafe(self.task.cancel if again else self.on_interrupt)

    def close(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(LAST_WORDS_SECONDS))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
