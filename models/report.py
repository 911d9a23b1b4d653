"""What a person sees of a run: a line per metric, and a bar if they watch."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class Report:
    """Says nothing: for tests, and for every process but the main one."""

    def note(self, text: str) -> None:
        """Something that is no metric."""

    def metric(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl: step, of, and loss, accuracy, learning_rate or held_out_loss, held_out_accuracy."""

    def advance(self, step: int, of: int) -> None:
        """`step` is done."""

    def close(self) -> None:
        """No more will come."""


class Console(Report):
    """Lines to `stream`; a bar on standard error if that is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bar: Any = None

    def note(self, text: str) -> None:
        self._line(text)

    def metric(self, record: dict[str, Any]) -> None:
        at = f"step {record['step']}/{record['of']}: "
        if "held_out_loss" in record:
            self._line(f"{at}held-out loss {record['held_out_loss']:.4f}, token accuracy {record['held_out_accuracy']:.3f}")
        else:
            self._line(
                f"{at}loss {record['loss']:.4f}, token accuracy {record['accuracy']:.3f}, learning rate {record['learning_rate']:.2e}"
            )

    def advance(self, step: int, of: int) -> None:
        if not sys.stderr.isatty():
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=of, initial=step - 1, unit="step", file=sys.stderr, dynamic_ncols=True, leave=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.stream, flush=True)
        if self.bar is not None:
            self.bar.refresh()
