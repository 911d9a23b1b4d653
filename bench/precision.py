"""`make bench-precision`: what each wire precision costs in quality and saves in bytes, by exported plan.

Every text goes through a device and a real cloud process token by token as it is written (teacher-forced), in chunks, all exit rows back.
The logits over a wire of fp32 are the reference; over any other wire they are off by what was rounded in this token and, through the KV
caches, in all before it, as in use. int8 has one scale per token and tensor, so that chunks are rounded as single tokens are.

`python -m bench.precision [NAME=FOLDER …]`; folders as plora-export makes them, by default out/demo and those of bench.network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from plora.artifact.cost import payload
from plora.artifact.errors import PloraError, UsageError
from plora.artifact.plan import ExchangePlan
from plora.device_runtime.api import PrivateSession
from plora.device_runtime.edge import Edge
from plora.device_runtime.text import Text
from plora.protocol import Precision, read_precision
from plora.protocol.events import CompressedArrived, StepDone
from plora.protocol.tensors import decode, encode

from .conditions import RESULTS, ROOT, write_results
from .link import Link
from .processes import cloud
from .profiles import profile
from .prompts import PASSAGE, PROMPTS

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
HELD_OUT = ROOT / "examples" / "persona" / "held_out.jsonl"
FACTS = 12
"""Of the persona's, asked and answered in one conversation."""
CHUNK_TOKENS = 64
OTHER_CHUNK_TOKENS = 16
"""Of fp32 once more: what the shapes of the steps change by themselves."""
DECODED_TOKENS = 32
"""Steps of one token each, for the bytes."""
SETTLE_SECONDS = 0.2
"""For what is still on its way through the link."""
DTYPES = ("fp16", "bf16", "int8")
EXACT_CHANNELS = 4
GROUP_CHANNELS = 64
BUDGETS_NATS = (1e-3, 1e-2)
"""Of mean KL: a wire is recommended for each."""


def texts(text: Text) -> dict[str, list[int]]:
    """Token ids of each: the prompts of bench/prompts.py through the chat template, its passage without, a chat on the persona's facts."""
    facts: list[dict[str, str]] = []
    for line in HELD_OUT.read_text(encoding="utf-8").splitlines()[:FACTS]:
        row = json.loads(line)
        facts += [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    chats = {prompt.name: list(prompt.messages) for prompt in PROMPTS} | {"facts": facts}
    return {name: text.encode_chat(messages) for name, messages in chats.items()} | {"passage": text.encode_raw(PASSAGE)}


def kinds_of(plan: ExchangePlan) -> list[str]:
    """Those that cross under `plan`."""
    has = {"entry": True, "compressed": bool(plan.exchanges), "injections": bool(plan.all_exchanges), "exit": True}
    return [kind for kind in asdict(Precision()) if has[kind]]


def wires(plan: ExchangePlan) -> list[str]:
    """What is tried: one kind alone, all alike, and every mix of fp16 and int8."""
    kinds = kinds_of(plan)
    alone = [f"{kind}={dtype}" for kind in kinds for dtype in DTYPES]
    return list(dict.fromkeys([*alone, *DTYPES, *(wire_of(mix, kinds) for mix in mixes(kinds))]))


def mixes(kinds: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(kinds, dtypes, strict=True)) for dtypes in itertools.product(("fp16", "int8"), repeat=len(kinds))]


def wire_of(mix: dict[str, str], kinds: Sequence[str]) -> str:
    """As read_precision reads it, of these kinds."""
    dtypes = {mix[kind] for kind in kinds}
    return dtypes.pop() if len(dtypes) == 1 else ",".join(f"{kind}={mix[kind]}" for kind in kinds)


# Quality


@dataclass(frozen=True)
class Distance:
    """Of logits [T, V] from a reference: by token. kl: KL(reference || logits) in nats; top: whether both rank the same token first;
    error: largest of a logit; nll: change of -log p of the token that follows, in nats."""

    kl: Doubles
    top: NDArray[np.bool_]
    error: Doubles
    nll: Doubles


def distance(reference: Floats, logits: Floats, ids: list[int]) -> Distance:
    """reference, logits: [T, V]. ids: the T that were fed, and the one after them if there is one."""
    p, q = log_softmax(reference), log_softmax(logits)
    following = np.arange(len(ids) - 1), np.asarray(ids[1:])
    return Distance(
        kl=np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0),  # below 0 in the last bits only
        top=reference.argmax(-1) == logits.argmax(-1),
        error=np.abs(reference - logits).max(-1).astype(np.float64),
        nll=(p - q)[following],
    )


def log_softmax(logits: Floats) -> Doubles:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def summary(distances: dict[str, Distance]) -> dict[str, Any]:
    """Over the tokens of all texts."""

    def gather(part: Callable[[Distance], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([part(each) for each in distances.values()])

    kl, nll = gather(lambda each: each.kl), gather(lambda each: each.nll)
    return {
        "mean_kl_nats": float(kl.mean()),
        "p99_kl_nats": float(np.quantile(kl, 0.99)),
        "largest_kl_nats": float(kl.max()),
        "top1_agreement": float(gather(lambda each: each.top).mean()),
        "largest_logit_error": float(gather(lambda each: each.error).max()),
        "nll_change_nats": float(nll.mean()),
        "nll_change_stderr_nats": float(nll.std() / len(nll) ** 0.5),
        "mean_kl_nats_by_text": {name: float(each.kl.mean()) for name, each in distances.items()},
    }


# A session


def read(session: PrivateSession, ids: list[int], chunk: int) -> Iterator[tuple[int, Floats]]:
    """Position and logits [T, V] of one step after the other, from an empty cache."""
    session.forget()
    for at in range(0, len(ids), chunk):
        some = ids[at : at + chunk]
        yield at, session._logits(some, len(some), at)


def compare(session: PrivateSession, known: dict[str, list[int]], reference: dict[str, Floats], chunk: int) -> dict[str, Any]:
    """`session` against the reference, step by step: logits of a whole text take much memory."""
    distances = {}
    for name, ids in known.items():
        parts = []
        for at, logits in read(session, ids, chunk):
            stop = at + len(logits)
            parts.append(distance(reference[name][at:stop], logits, ids[at : stop + 1]))
        distances[name] = Distance(*(np.concatenate(fields) for fields in zip(*map(_fields, parts), strict=True)))
    return summary(distances)


def _fields(one: Distance) -> tuple[NDArray[Any], ...]:
    return one.kl, one.top, one.error, one.nll


def socket_bytes(session: PrivateSession, link: Link, ids: list[int]) -> tuple[float, float]:
    """Bytes up and down per token of decoding on the TCP socket, HTTP/2 and gRPC framing included."""
    first = len(ids) - DECODED_TOKENS
    if first < 1:
        raise ValueError(f"a text of {len(ids)} tokens, expected more than {DECODED_TOKENS}")
    session.forget()
    session._logits(ids[:first], 1, 0)
    time.sleep(SETTLE_SECONDS)
    before = link.counters()
    for at in range(first, len(ids)):
        session._logits(ids[at : at + 1], 1, at)
    time.sleep(SETTLE_SECONDS)
    after = link.counters()
    return (after.up_bytes - before.up_bytes) / DECODED_TOKENS, (after.down_bytes - before.down_bytes) / DECODED_TOKENS


def bytes_per_token(edge: Edge, wire: str, up: float, down: float) -> dict[str, float]:
    """Communication reduction as in bench/wire.py: with all framing counted against us."""
    cost = payload(edge.plan, edge.shape, asdict(read_precision(wire)))
    exchanged, full = up + down - cost.entry_up - cost.exit_down, cost.full_rank_up + cost.full_rank_down
    return {
        "up_bytes_per_token": up,
        "down_bytes_per_token": down,
        "payload_up_bytes_per_token": cost.up,
        "payload_down_bytes_per_token": cost.down,
        "communication_reduction": 1 - exchanged / full if full else 0.0,
        "communication_reduction_payload_only": cost.communication_reduction,
    }


# What the tensors are like


@contextmanager
def recorded(session: PrivateSession) -> Iterator[dict[str, list[Floats]]]:
    """The tensors that cross in the meantime, by kind."""
    machine, plan = session._stepper.machine, session.edge.plan
    seen: dict[str, list[Floats]] = {kind: [] for kind in kinds_of(plan)}
    entry, injections, receive = machine.entry, machine.injections, machine.receive

    def on_entry(hidden: Floats, exit_rows: int, injection: Floats | None = None, position: int | None = None) -> bytes:
        seen["entry"].append(hidden.copy())
        if injection is not None:
            seen["injections"].append(injection.copy())
        return entry(hidden, exit_rows, injection, position)

    def on_injections(values: Floats, step: int | None = None) -> bytes:
        seen["injections"].append(values.copy())
        return injections(values, step)

    def on_receive(data: bytes) -> object:
        event = receive(data)
        if isinstance(event, CompressedArrived):
            seen["compressed"].append(event.values.copy())
        elif isinstance(event, StepDone):
            seen["exit"].append(event.hidden.copy())
        return event

    with mock.patch.multiple(machine, entry=on_entry, injections=on_injections, receive=on_receive):
        yield seen


def crossed(values: Floats, dtype: str) -> Floats:
    """As they come out at the other end."""
    rows, columns = values.shape
    return decode(encode(values, dtype, rows, columns, "here"), dtype, rows, columns, "here")


def spread(tensors: list[Floats]) -> dict[str, Any]:
    """How even the values of a token are, and what is lost of them, norm of the error over norm of the values: median and worst token.
    peak_over_rms is what int8's one scale has to span; one_channel: how often the peak lies in the channel where it lies most often."""
    norms = [np.maximum(np.linalg.norm(values, axis=1), np.finfo(np.float32).tiny) for values in tensors]
    peaks = [np.abs(values).max(1) / norm * values.shape[1] ** 0.5 for values, norm in zip(tensors, norms, strict=True)]
    places = Counter((values.shape[1], int(channel)) for values in tensors for channel in np.abs(values).argmax(1))
    lost = {
        dtype: [np.linalg.norm(crossed(values, dtype) - values, axis=1) / norm for values, norm in zip(tensors, norms, strict=True)]
        for dtype in DTYPES
    }
    return {
        "peak_over_rms": _median_and_largest(peaks),
        "one_channel": max(places.values()) / places.total(),
        "relative_error": {dtype: _median_and_largest(each) for dtype, each in lost.items()},
    }


def _median_and_largest(parts: list[NDArray[Any]]) -> dict[str, float]:
    values = np.concatenate(parts)
    return {"median": float(np.median(values)), "largest": float(values.max())}


# Why an entry in int8 costs what it does: other ways to round it, none of them on the wire; rounded here, sent in fp32

Rounding = Callable[[Floats, int], Floats]
"""The entry [T, hidden] and the position of its first token -> what the cloud shall see."""


def int8(values: Floats) -> Floats:
    return crossed(values, "int8")


def all_but_the_first(hidden: Floats, position: int) -> Floats:
    return np.concatenate([hidden[:1], int8(hidden[1:])]) if position == 0 else int8(hidden)


def all_but(channels: NDArray[np.intp]) -> Rounding:
    def rounded(hidden: Floats, position: int) -> Floats:
        rest = hidden.copy()
        rest[:, channels] = 0.0
        rest = int8(rest)
        rest[:, channels] = hidden[:, channels]
        return rest

    return rounded


def in_groups(hidden: Floats, position: int) -> Floats:
    return np.concatenate([int8(hidden[:, at : at + GROUP_CHANNELS]) for at in range(0, hidden.shape[1], GROUP_CHANNELS)], axis=1)


def entry_roundings(entries: list[Floats]) -> dict[str, Rounding]:
    fullest = np.argsort(-np.square(np.concatenate(entries)).mean(0))[:EXACT_CHANNELS]
    return {
        "as on the wire": lambda hidden, position: int8(hidden),
        "the first token of each text exact": all_but_the_first,
        f"the {EXACT_CHANNELS} fullest channels exact": all_but(fullest),
        f"a scale per {GROUP_CHANNELS} channels": in_groups,
    }


@contextmanager
def entries_rounded(session: PrivateSession, rounding: Rounding) -> Iterator[None]:
    machine = session._stepper.machine
    entry = machine.entry

    def on_entry(hidden: Floats, exit_rows: int, injection: Floats | None = None, position: int | None = None) -> bytes:
        assert position is not None  # the stepper says it always
        return entry(rounding(hidden, position), exit_rows, injection, position)

    with mock.patch.object(machine, "entry", on_entry):
        yield


# A plan


def measure(folder: Path) -> dict[str, Any]:
    """All figures of one export."""
    edge = Edge(folder / "edge")
    plan = edge.plan
    found: dict[str, dict[str, Any]] = {}
    with cloud(folder / "cloud", 1) as server, Link(server.address, profile("loopback")) as link:

        def session(wire: str) -> PrivateSession:
            return PrivateSession(edge, link.address, read_precision(wire))

        def measured(wire: str, one: PrivateSession) -> None:
            sizes = bytes_per_token(edge, wire, *socket_bytes(one, link, known["chat"]))
            found[wire] = {**compare(one, known, reference, CHUNK_TOKENS), **sizes}
            print(line(wire, found[wire]), flush=True)

        with session("fp32") as one:
            known = texts(one.text)
            with recorded(one) as seen:
                reference = {name: np.concatenate([logits for _, logits in read(one, ids, CHUNK_TOKENS)]) for name, ids in known.items()}
            measured("fp32", one)
            floor = compare(one, known, reference, OTHER_CHUNK_TOKENS)
            entries = {}
            for name, way in entry_roundings(seen["entry"]).items():
                with entries_rounded(one, way):
                    entries[name] = compare(one, known, reference, CHUNK_TOKENS)
        for wire in wires(plan):
            with session(wire) as one:
                measured(wire, one)
    nll = [-log_softmax(reference[name])[np.arange(len(ids) - 1), ids[1:]] for name, ids in known.items()]
    return {
        "kinds": kinds_of(plan),
        "round_trips": plan.round_trips,
        "front_layers": plan.front_layers,
        "back_layers": plan.back_layers,
        "core_stdev": float(np.concatenate([private["cores"].ravel() for private in edge._private.values()]).std()),
        "tokens_by_text": {name: len(ids) for name, ids in known.items()},
        "reference_nll_nats": float(np.concatenate(nll).mean()),
        "fp32_in_other_chunks": floor,
        "tensors": {kind: spread(values) for kind, values in seen.items()},
        "entry_in_int8": entries,
        "wires": found,
        "recommended": {f"{budget:g}": cheapest(found, budget) for budget in BUDGETS_NATS},
    }


def cheapest(found: dict[str, dict[str, Any]], budget: float) -> str | None:
    """The wire of fewest bytes, tensors alone, whose mean KL stays below `budget`; of equals the one nearest to fp32."""
    good = [wire for wire, figures in found.items() if figures["mean_kl_nats"] < budget]
    return min(good, key=lambda wire: (_payload(found[wire]), found[wire]["mean_kl_nats"]), default=None)


def cheapest_for_all(plans: dict[str, Any], budget: float) -> dict[str, Any] | None:
    """The mix of all four kinds with a mean KL below `budget` under every plan; of fewest bytes, each plan's as a share of its fp32."""
    found = []
    for mix in mixes(list(asdict(Precision()))):
        each = {name: one["wires"][wire_of(mix, one["kinds"])] for name, one in plans.items()}
        worst = max(one["mean_kl_nats"] for one in each.values())
        if worst < budget:
            share = sum(_payload(one) / _payload(plans[name]["wires"]["fp32"]) for name, one in each.items()) / len(each)
            found.append((share, worst, wire_of(mix, list(mix))))
    if not found:
        return None
    share, worst, wire = min(found)
    return {"wire": wire, "worst_mean_kl_nats": worst, "payload_bytes_over_fp32": share}


def _payload(figures: dict[str, Any]) -> float:
    return figures["payload_up_bytes_per_token"] + figures["payload_down_bytes_per_token"]


# For a person


def line(wire: str, figures: dict[str, Any]) -> str:
    return (
        f"| {wire} | {figures['mean_kl_nats']:.1e} | {figures['p99_kl_nats']:.1e} | {100 * figures['top1_agreement']:.2f} % "
        f"| {figures['largest_logit_error']:.2g} | {figures['nll_change_nats']:+.1e} | {figures['up_bytes_per_token']:,.0f} "
        f"| {figures['down_bytes_per_token']:,.0f} | {100 * figures['communication_reduction']:.1f} % |"
    )


HEAD = (
    "| wire | mean KL, nats | p99 | top-1 agreement | largest logit error | NLL change, nats | bytes up | down | reduction |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def plot(plans: dict[str, Any]) -> Path:
    """KL over bytes per token, one panel per plan."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "plora", "svg.fonttype": "none"})
    from matplotlib import pyplot

    columns = min(len(plans), 3)
    rows = -(-len(plans) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows), squeeze=False, sharey=True)
    for axes in grid.flat[len(plans) :]:
        axes.set_visible(False)
    for axes, (name, figures) in zip(grid.flat, plans.items(), strict=False):
        for label, style, chosen in (
            ("one kind alone", {"marker": ".", "color": "silver"}, lambda wire: "=" in wire and "," not in wire),
            ("mixes of fp16 and int8", {"marker": "o", "facecolors": "none", "edgecolors": "tab:blue"}, lambda wire: "," in wire),
            ("all alike", {"marker": "s", "color": "tab:red"}, lambda wire: "=" not in wire and wire != "fp32"),
        ):
            points = [(_total(one), one["mean_kl_nats"]) for wire, one in figures["wires"].items() if chosen(wire)]
            axes.scatter(*zip(*points, strict=True), label=label, s=24, **style)
        for wire in DTYPES:
            one = figures["wires"][wire]
            axes.annotate(wire, (_total(one), one["mean_kl_nats"]), textcoords="offset points", xytext=(6, 3), fontsize=8)
        for budget in BUDGETS_NATS:
            axes.axhline(budget, color="gray", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="bytes per token on the socket, up + down",
            yscale="log",
            title=f"{name}: fp32 takes {_total(figures['wires']['fp32']):,.0f}",
        )
        axes.title.set_fontsize(9)
        axes.grid(True, alpha=0.3)
    for row in grid:
        row[0].set_ylabel("mean KL(fp32 || wire), nats")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / "precision.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def short(figures: Any) -> Any:
    """Numbers to 5 digits: the rest is noise, and there are thousands."""
    if isinstance(figures, dict):
        return {name: short(value) for name, value in figures.items()}
    return float(f"{figures:.5g}") if isinstance(figures, float) else figures


def _total(figures: dict[str, Any]) -> float:
    return figures["up_bytes_per_token"] + figures["down_bytes_per_token"]


def folders(named: list[str]) -> dict[str, Path]:
    """NAME=FOLDER each; without any, the demo's and those of bench.network. Raises UsageError."""
    if not named:
        candidates = {"demo": ROOT / "out" / "demo"} | {path.name: path for path in sorted((ROOT / "out" / "network").glob("*"))}
        found = {name: path for name, path in candidates.items() if (path / "edge").is_dir() and (path / "cloud").is_dir()}
        if not found:
            raise UsageError("no exported plan in out/: `make demo` first, or say NAME=FOLDER")
        return found
    pairs = [each.partition("=") for each in named]
    for name, _, folder in pairs:
        if not (Path(folder) / "edge").is_dir():
            raise UsageError(f"{name}={folder}: no folder with an edge half, expected NAME=FOLDER")
    return {name: Path(folder) for name, _, folder in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", metavar="NAME=FOLDER")
    chosen = folders(parser.parse_args().plans)
    figures: dict[str, Any] = {
        "chunk_tokens": CHUNK_TOKENS,
        "decoded_tokens_for_bytes": DECODED_TOKENS,
        "bytes": "TCP payload on the socket per decoded token, HTTP/2, gRPC and protobuf framing included; payload: tensors alone",
        "plans": {},
    }
    for name, folder in chosen.items():
        print(f"\n{name}: {folder}\n{HEAD}", flush=True)
        figures["plans"][name] = measure(folder)
        print(json.dumps({key: figures["plans"][name][key] for key in ("tensors", "entry_in_int8", "recommended")}, indent=1), flush=True)
        figures["recommended_for_all"] = {f"{budget:g}": cheapest_for_all(figures["plans"], budget) for budget in BUDGETS_NATS}
        print(
            write_results("precision", short(figures), " ".join(["python -m bench.precision", *sys.argv[1:]])), flush=True
        )  # each takes minutes
    print(json.dumps(figures["recommended_for_all"], indent=1), plot(figures["plans"]), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except PloraError as error:
        sys.exit(str(error))
