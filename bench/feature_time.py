"""What private features cost the device: the graphs of linear cores and of cores with features, in turns, in one process."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from plora.artifact.shape import DecoderShape
from plora.export.edge_graphs import cores_graph, entry_graph

ROWS = (1, 64)
"""Of a token, and of a prompt's small chunk."""
ROUNDS, RUNS = 60, 5
"""Turns of all graphs, and runs of each in a turn."""


def device_time(shape: DecoderShape, rank: int, values: int, features: tuple[int, ...]) -> dict[str, Any]:
    """Median microseconds of CPU time of one run by graph, rows and features (0: linear), and the median over the turns of its ratio to
    the linear one's, one thread. CPU time, since others may use the machine. values: of the injection."""
    random = np.random.default_rng(0)

    def floats(*size: int) -> Any:
        return random.standard_normal(size).astype(np.float32)

    figures: dict[str, Any] = {}
    for name in ("cores", "entry"):
        sessions = {n: _session(cores_graph(n > 0) if name == "cores" else entry_graph(shape, n > 0)) for n in features}
        for rows in ROWS:
            given = {"compressed": floats(rows, rank)}
            if name == "entry":
                given = {"hidden": floats(rows, shape.hidden), "down": floats(rank, shape.hidden)}
            inputs = {n: {**given, "cores": floats(values, n or rank)} for n in features}
            for n in features:
                inputs[n] |= {"features": floats(n, rank), "features_bias": floats(n)} if n else {}
            turns = [{n: _micros(sessions[n], inputs[n]) for n in features} for _ in range(ROUNDS)]
            figures[f"{name}, {rows} rows"] = {
                str(n): {
                    "micros": round(statistics.median(turn[n] for turn in turns), 1),
                    "over_linear": round(statistics.median(turn[n] / turn[features[0]] for turn in turns), 2),
                }
                for n in features
            }
    return figures


def _session(graph: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _micros(session: ort.InferenceSession, inputs: dict[str, Any]) -> float:
    began = time.thread_time()
    for _ in range(RUNS):
        session.run(None, inputs)
    return (time.thread_time() - began) * 1e6 / RUNS
