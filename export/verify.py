"""Runs both halves as written to disk and compares them with the record of the unsplit model, tensor by tensor.

Run in a process of its own (`python -m plora.export.verify DIR`): nothing of the exporter's memory can stand in for a file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..artifact.errors import DamagedFile, MissingFile, PloraError, VerificationError
from ..artifact.manifest import CloudManifest, EdgeManifest, check_files, read_manifest
from ..artifact.names import GRAPH_FORMATS
from ..artifact.strict import plain
from .export import private_stdout
from .joined import Floats, Halves
from .reference import REFERENCE, other_cores

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
"""Largest error allowed, relative to the largest value of the tensor. fp32: rounding over 30 layers gives some 1e-5, a wrong
wire, layer or core gives 1e-2 and more. fp16, bf16: a mantissa of 10 and 7 bits where the record has 23."""
GAP = 1e-3
"""Greedy tokens may differ where the unsplit model's two best logits lie closer than this (design: exactness)."""
CHUNKS = (5, 1, 1)
"""The probe is fed as 5 tokens, 1, 1 and the rest, so that the cache is written and read in every way."""
SENSITIVITY = 10
"""The negative control, other cores, must move the exit by so many times the tolerance (fp32)."""


@dataclass
class Report:
    """What was compared. errors: tensor -> largest error relative to the tensor's largest value. In 16 bits `greedy_equal` is
    only reported; other_cores_error: of the exit with other cores against the record; other_cores_moved: how far they moved it;
    kl_nats and top1_agrees are of the last probe token's distribution against fp32."""

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
    other_cores_error: float = 0.0
    other_cores_moved: float = 0.0


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
    logits = halves.logits(got["residual"][-1:])
    report.errors["logits"] = relative_error(logits[0], expected["logits"])
    report.kl_nats, report.top1_agrees = _compare_distributions(logits[0], expected["logits"])
    _verify_greedy(halves, logits[0], expected, report)
    _verify_ort(halves, got, report)
    _verify_other_cores(halves, ids, got, expected, report)
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
        logits = halves.logits(halves.step([token])["residual"])[0]


def _verify_ort(halves: Halves, got: dict[str, Floats], report: Report) -> None:
    """The `.ort` graphs on the same inputs."""
    plan = halves.plan
    last = got["residual"][-1:]
    answers: list[list[Floats]] = []
    sessions = halves.sessions
    for graphs in GRAPH_FORMATS:
        halves.sessions = halves.open_graphs(graphs)
        halves.reset()
        own = [halves.embed([0, 1]), halves.logits(last)]
        own += [halves.inject(exchange, got[f"compressed.{exchange.index}"]) for exchange in plan.exchanges]
        if plan.entry_exchange:
            own.append(halves.entry_injection(plan.entry_exchange, got["entry"]))
        own.append(halves.device_layers(0, plan.front_layers, got["embedded"]))
        own.append(halves.device_layers(plan.layers - plan.back_layers, plan.layers, got["exit"]))
        answers.append(own)
    halves.sessions = sessions
    report.ort_error = max(relative_error(ours, theirs) for ours, theirs in zip(*answers, strict=True))


def _verify_other_cores(halves: Halves, ids: list[int], got: dict[str, Floats], expected: dict[str, NDArray[Any]], report: Report) -> None:
    """With other cores the halves still equal the unsplit model, and (the negative control) no longer what they were."""
    if not halves.cores:
        return
    own = halves.cores
    halves.cores = other_cores(own)
    other = probe(halves, ids)["exit"]
    halves.cores = own
    report.other_cores_error = relative_error(other, expected["other_exit"])
    report.other_cores_moved = relative_error(other, got["exit"])


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
    if report.other_cores_error > report.tolerance:
        raise VerificationError(
            f"with other cores the exit differs from the unsplit model by {report.other_cores_error:.2e} of its largest value, allowed "
            f"{report.tolerance:.0e} in {report.dtype}: an up-projection or what feeds it is wrong"
        )
    if exact and report.other_cores_moved and report.other_cores_moved < SENSITIVITY * report.tolerance:
        raise VerificationError(
            f"other cores move the exit by {report.other_cores_moved:.2e} only, expected at least {SENSITIVITY * report.tolerance:.0e}: "
            "the comparison would not notice a wrong core"
        )


if __name__ == "__main__":
    try:
        out = private_stdout()
        print(json.dumps(plain(verify(Path(sys.argv[1])))), file=out, flush=True)
    except PloraError as error:
        sys.exit(f"{error}")
