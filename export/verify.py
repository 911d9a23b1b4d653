"""Runs both halves as written to disk and compares them with the record of the unsplit model, tensor by tensor.

Run in a process of its own (`python -m plora.export.verify DIR`): nothing of the exporter's memory can stand in for a file.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifact.errors import DamagedFile, MissingFile, PloraError, VerificationError, WrongPair
from ..artifact.manifest import CloudManifest, EdgeManifest, check_files, read_manifest
from ..artifact.names import CLOUD_GRAPH, CORES, CORES_GRAPH, EMBEDDING_GRAPH, GRAPH_FORMATS, HEAD_GRAPH, HEAD_TABLE, TABLE, core_name
from ..artifact.plan import Exchange, Segment
from ..artifact.strict import plain
from ..artifact.walk import walk
from .export import private_stdout
from .reference import REFERENCE

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
"""Largest error allowed, relative to the largest value of the tensor. fp32: rounding over 30 layers gives some 1e-5, a wrong
wire, layer or core gives 1e-2 and more. fp16, bf16: a mantissa of 10 and 7 bits where the record has 23."""
GAP = 1e-3
"""Greedy tokens may differ where the unsplit model's two best logits lie closer than this (design: exactness)."""
CHUNKS = (5, 1, 1)
"""The probe is fed as 5 tokens, 1, 1 and the rest, so that the cache is written and read in every way."""
SENSITIVITY = 10
"""The negative control, one core perturbed, must move the exit by so many times the tolerance (fp32)."""

Floats = NDArray[np.float32]


@dataclass
class Report:
    """What was compared. errors: tensor -> largest error relative to the tensor's largest value. In 16 bits `greedy_equal` is
    only reported; kl_nats and top1_agrees are of the last probe token's distribution against fp32."""

    contract_hash: str
    dtype: str
    edge_dtype: str
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)
    ort_error: float = 0.0
    greedy_tokens: int = 0
    greedy_equal: int = 0
    greedy_close_calls: int = 0
    kl_nats: float = 0.0
    top1_agrees: bool = False
    perturbed_core: str = ""
    perturbed_error: float = 0.0


class Halves:
    """Both halves of an artifact, driven by the walk, without a network."""

    def __init__(self, out: Path, graphs: str) -> None:
        self.cloud = read_manifest(CloudManifest, out / "cloud")
        self.edge = read_manifest(EdgeManifest, out / "edge")
        if self.cloud.contract_hash != self.edge.contract_hash:
            raise WrongPair(
                f"{out}: cloud has contract {self.cloud.contract_hash[:16]}…, edge {self.edge.contract_hash[:16]}…: not of one export"
            )
        self.plan, self.shape = self.cloud.contract.plan, self.cloud.contract.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
            self.graph: Any = torch.jit.load(str(out / "cloud" / CLOUD_GRAPH), map_location="cpu")
        self.segments = list(self.graph.segments.children())
        self.sessions = {
            name: ort.InferenceSession(str(out / "edge" / f"{name}.{graphs}"), providers=["CPUExecutionProvider"])
            for name in (EMBEDDING_GRAPH, CORES_GRAPH, HEAD_GRAPH)
        }
        dtype = np.dtype("<f4") if self.edge.dtype == "fp32" else np.dtype("<f2")
        size = (self.shape.vocabulary, self.shape.hidden)
        self.table = np.memmap(out / "edge" / TABLE, dtype, "r", shape=size)
        self.head_table = self.table if self.edge.tied else np.memmap(out / "edge" / HEAD_TABLE, dtype, "r", shape=size)
        with safe_open(out / "edge" / CORES, framework="np") as file:
            self.cores: dict[str, Floats] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.reset()

    def reset(self) -> None:
        """Forgets the session."""
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.cloud.dtype]
        size = (1, self.shape.kv_heads, CACHE_TOKENS, self.shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype) for _ in range(self.plan.cloud_layers)]
        self.values = [torch.zeros(size, dtype=dtype) for _ in range(self.plan.cloud_layers)]
        self.length = 0

    def run(self, name: str, **inputs: NDArray[Any]) -> Floats:
        (output,) = self.sessions[name].run(None, inputs)
        return output  # pyright: ignore[reportReturnType]  each of our graphs has one float32 output

    def embed(self, ids: list[int]) -> Floats:
        return self.run(EMBEDDING_GRAPH, ids=np.asarray(ids, np.int64), table=self.table)

    def logits(self, exit_rows: Floats) -> Floats:
        return self.run(HEAD_GRAPH, exit=exit_rows, table=self.head_table)

    def inject(self, exchange: Exchange, compressed: Floats) -> Floats:
        block = np.zeros((exchange.injection_columns, exchange.compressed_columns), np.float32)
        for column in exchange.columns:
            block[column.up_start : column.up_stop, column.down_start : column.down_stop] = self.cores[
                core_name(column.layer, column.target)
            ]
        return self.run(CORES_GRAPH, compressed=compressed, cores=block)

    @torch.inference_mode()
    def step(self, ids: list[int]) -> dict[str, Floats]:
        """One step; every tensor that crosses between the halves, by the names of the record."""
        seen: dict[str, Floats] = {"entry": self.embed(ids)}
        hidden = torch.tensor(seen["entry"], dtype=self.keys[0].dtype)[None]
        slots, lengths, counts = torch.tensor([0]), torch.tensor([self.length]), torch.tensor([len(ids)])
        tables = self.graph.tables(lengths, counts, slots, hidden)
        injections: dict[int, Tensor] = {}
        for stage in walk(self.plan):
            if isinstance(stage, Segment):
                segment = self.segments[stage.index]
                u, compressed = segment.open(hidden)
                if stage.exchange is not None:
                    exchange = self.plan.exchanges[stage.exchange]
                    seen[f"compressed.{exchange.index}"] = compressed[0].float().numpy()
                    injection = self.inject(exchange, seen[f"compressed.{exchange.index}"])
                    seen[f"injection.{exchange.index}"] = injection
                    injections[exchange.index] = torch.tensor(injection, dtype=hidden.dtype)[None]
                inputs = [injections[index] for index in stage.inputs]
                own = self.plan.cache_of(stage)
                hidden = segment(hidden, segment.ahead(u), inputs, tables, slots, lengths, self.keys[own], self.values[own])
        seen["exit"] = hidden[0].float().numpy()
        self.length += len(ids)
        return seen


CACHE_TOKENS = 512
"""Of the verifier's one session: the probe and its continuation are under 100 tokens."""


def read_reference(out: Path) -> dict[str, NDArray[Any]]:
    path = out / "verification" / REFERENCE
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found; verification compares with what export recorded there") from None
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file: {error}") from None


def probe(halves: Halves, ids: list[int]) -> dict[str, Floats]:
    """All tensors of the probe, fed in chunks from an empty session."""
    halves.reset()
    parts: list[dict[str, Floats]] = []
    rest = ids
    for size in (*CHUNKS, len(ids)):
        chunk, rest = rest[:size], rest[size:]
        if chunk:
            parts.append(halves.step(chunk))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def relative_error(got: Floats, expected: Floats) -> float:
    """Largest absolute difference over the largest value; infinite where something is not finite."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(got - expected).max()) / scale


def verify(out: Path) -> Report:
    """Raises ArtifactError's children for what is on disk, VerificationError for what it computes."""
    check_files(out / "cloud", read_manifest(CloudManifest, out / "cloud"))
    check_files(out / "edge", read_manifest(EdgeManifest, out / "edge"))
    expected = read_reference(out)
    halves = Halves(out, GRAPH_FORMATS[0])
    report = Report(halves.cloud.contract_hash, halves.cloud.dtype, halves.edge.dtype, _tolerance(halves))
    ids = expected["ids"].tolist()
    got = probe(halves, ids)
    for name, tensor in got.items():
        report.errors[name] = relative_error(tensor, expected[name])
    logits = halves.logits(got["exit"][-1:])
    report.errors["logits"] = relative_error(logits[0], expected["logits"])
    report.kl_nats, report.top1_agrees = _compare_distributions(logits[0], expected["logits"])
    _verify_greedy(halves, logits[0], expected, report)
    _verify_ort(out, halves, got, report)
    _verify_sensitivity(halves, ids, got, report)
    _judge(report)
    return report


def _tolerance(halves: Halves) -> float:
    return max(TOLERANCES[halves.cloud.dtype], TOLERANCES[halves.edge.dtype])


def _compare_distributions(got: Floats, expected: Floats) -> tuple[float, bool]:
    """KL(expected || got) in nats, and whether the best token is the same."""
    log_p, log_q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (expected, got))
    return float((np.exp(log_p) * (log_p - log_q)).sum()), bool(got.argmax() == expected.argmax())


def _verify_greedy(halves: Halves, logits: Floats, expected: dict[str, NDArray[Any]], report: Report) -> None:
    """Continues the probe; after a token where the record's two best were close, its choice is followed."""
    for token, gap in zip(expected["greedy"].tolist(), expected["gaps"].tolist(), strict=True):
        report.greedy_tokens += 1
        if int(logits.argmax()) == token:
            report.greedy_equal += 1
        elif gap < GAP:
            report.greedy_close_calls += 1
        logits = halves.logits(halves.step([token])["exit"])[0]


def _verify_ort(out: Path, halves: Halves, got: dict[str, Floats], report: Report) -> None:
    """The `.ort` graphs on the same inputs."""
    other = Halves.__new__(Halves)
    other.__dict__.update(halves.__dict__)
    other.sessions = {
        name: ort.InferenceSession(str(out / "edge" / f"{name}.ort"), providers=["CPUExecutionProvider"]) for name in halves.sessions
    }
    pairs = [(other.embed([0, 1]), halves.embed([0, 1])), (other.logits(got["exit"][-1:]), halves.logits(got["exit"][-1:]))]
    pairs += [
        (other.inject(exchange, got[f"compressed.{exchange.index}"]), got[f"injection.{exchange.index}"])
        for exchange in halves.plan.exchanges
    ]
    report.ort_error = max(relative_error(a, b) for a, b in pairs)


def _verify_sensitivity(halves: Halves, ids: list[int], got: dict[str, Floats], report: Report) -> None:
    """The negative control: with one core perturbed, the same comparison must fail."""
    if not halves.cores:
        return
    name = sorted(halves.cores)[len(halves.cores) // 2]
    core = halves.cores[name]
    rng = np.random.default_rng(0)
    halves.cores[name] = core + (rng.standard_normal(core.shape) * max(0.1, float(np.abs(core).max()))).astype(np.float32)
    report.perturbed_core = name
    report.perturbed_error = relative_error(probe(halves, ids)["exit"], got["exit"])
    halves.cores[name] = core


def _judge(report: Report) -> None:
    for name, error in report.errors.items():  # in the order of the walk: the first one is nearest to the cause
        if error > report.tolerance:
            raise VerificationError(
                f"{name} differs from the unsplit model by {error:.2e} of its largest value, "
                f"allowed {report.tolerance:.0e} in {report.dtype}"
            )
    if report.ort_error > TOLERANCES["fp32"]:
        raise VerificationError(f"the .ort graphs differ from the .onnx graphs by {report.ort_error:.2e}, allowed {TOLERANCES['fp32']:.0e}")
    exact = report.dtype == report.edge_dtype == "fp32"
    if exact and report.greedy_equal + report.greedy_close_calls < report.greedy_tokens:
        raise VerificationError(
            f"{report.greedy_equal} of {report.greedy_tokens} greedy tokens equal those of the unsplit model, expected all"
        )
    if exact and report.perturbed_core and report.perturbed_error < SENSITIVITY * report.tolerance:
        raise VerificationError(
            f"perturbing {report.perturbed_core} moves the exit by {report.perturbed_error:.2e} only, expected at least "
            f"{SENSITIVITY * report.tolerance:.0e}: the comparison would not notice a wrong core"
        )


if __name__ == "__main__":
    try:
        out = private_stdout()
        print(json.dumps(plain(verify(Path(sys.argv[1])))), file=out, flush=True)
    except PloraError as error:
        sys.exit(f"{error}")
