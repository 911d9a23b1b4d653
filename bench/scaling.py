"""The tables of docs/scaling.md, from bench/formula.py: `python -m bench.scaling` prints them, `--write` puts them there."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from plora.artifact.cost import payload
from plora.artifact.errors import UsageError
from plora.artifact.shape import DecoderShape

from .formula import (
    A100,
    GPUS,
    H100,
    LINKS,
    PHONE,
    PHONES,
    RANK,
    SHAPES,
    Chip,
    Setup,
    Speculation,
    alone,
    alone_work,
    anchors,
    cloud_work,
    decode,
    device_work,
    first_token,
    plans,
    rtt_for,
)

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"

SPECULATIONS = (Speculation(), Speculation(4, 1.5), Speculation(4, 2.5))
PROMPT_TOKENS = 512


def tables() -> dict[str, str]:
    """Markdown by name."""
    seven, big = SHAPES["Llama-2-7B"], SHAPES["LLaMA-33B"]
    found = {"machines": _machines(), "anchors": _anchors(), "costs": _costs()}
    for name in ("Llama-2-7B", "Llama-3-8B", "LLaMA-33B"):
        found[f"decode {name}"] = _rates(SHAPES[name])
    found["over device-only"] = _ratios(seven, 3.0, 1 / alone(seven, PHONE, "int4"), H100)
    found["over one GPU"] = _ratios(big, 0.8, 1 / alone(big, A100, "fp16"), A100)
    return {**found, "parts": _parts(), "first token": _first_tokens(), "pairs": _pairs(seven)}


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _machines() -> str:
    head = ["machine", "memory, GB/s", "share", "TFLOP/s", "share", "holds, GB", "source"]
    rows = [
        [
            one.name, f"{one.gigabytes_per_second:,g}", f"{one.bandwidth_share:g}", f"{one.teraflops:g}", f"{one.compute_share:g}",
            f"{one.memory_gb:g}", one.source,
        ]
        for one in (*GPUS, *PHONES)
    ]  # fmt: skip
    return _table(head, rows)


def _anchors() -> str:
    rows = [[what, f"{true:g}", f"{guess:.1f}", f"{100 * (guess / true - 1):+.0f} %"] for what, true, guess in anchors()]
    return _table(["published", "tokens/s", "formula", "error"], rows)


def _costs() -> str:
    rows = []
    for name, shape in SHAPES.items():
        for plan_name, plan in plans(shape, 64 if name == "SmolLM2-135M" else RANK).items():
            setup, cost = Setup(shape, plan), payload(plan, shape, "fp16")
            sizes = [device_work(setup.on_device(weights), 1, 1).weight_bytes / 1e9 for weights in ("fp16", "int4")]
            rows.append(
                [
                    name, plan_name, str(plan.front_layers), str(plan.round_trips), f"{cost.up / 1e3:.1f} / {cost.down / 1e3:.1f}",
                    f"{cloud_work(setup, 1).weight_bytes / 1e9:.2f}", f"{sizes[0]:.2f} / {sizes[1]:.2f}",
                ]
            )  # fmt: skip
    head = ["decoder", "plan", "front layers", "round trips", "kB per token, up / down", "cloud reads, GB", "device reads, GB: fp16 / int4"]
    return _table(head, rows)


def _rates(shape: DecoderShape) -> str:
    rows = []
    for name, plan in plans(shape).items():
        setup = Setup(shape, plan)
        built = decode(setup).tokens_per_second if _fits(setup) else None
        small = [decode(replace(setup.on_device("int4"), link=link)).tokens_per_second for link in LINKS]
        rows.append([name, _rate(built), *map(_rate, small)])
    for chip, weights in ((PHONE, "int4"), (A100, "fp16"), (H100, "fp16")):
        held = chip.holds(alone_work(shape, weights).weight_bytes)
        rows.append(
            [f"no network: all on {chip.name}, {weights}", _rate(1 / alone(shape, chip, weights) if held else None), *[""] * len(LINKS)]
        )
    links = [f"{link.name}, {link.rtt_millis:g} ms" for link in LINKS]
    return _table(["plan", f"fp16 on the device, {links[1]}", *[f"int4, {link}" for link in links]], rows)


def _ratios(shape: DecoderShape, wanted: float, base: float, cloud: Chip) -> str:
    """base: tokens/s of what the split is compared with."""
    rows = []
    for name, plan in plans(shape).items():
        setup = Setup(shape, plan, cloud=cloud).on_device("int4")
        shares = [f"{100 * decode(setup, one).tokens_per_second / base:.0f} %" for one in SPECULATIONS]
        needed = [rtt_for(setup, wanted * base, one) for one in SPECULATIONS]
        rows.append([name, *shares, *[f"{rtt:.1f} ms" if rtt >= 0 else "none" for rtt in needed]])
    steps = [f"{one.gained:g} of {one.rows}" for one in SPECULATIONS]
    return _table(["plan", *steps, *[f"RTT for {100 * wanted:.0f} %, {step}" for step in steps]], rows)


def _parts() -> str:
    rows = []
    for shape in ("Llama-2-7B", "LLaMA-33B"):
        for name in ("paper", "grouped by 6", "entry, shared 2048", "entry, front, shared 2048"):
            one = decode(Setup(SHAPES[shape], plans(SHAPES[shape])[name]).on_device("int4"))
            parts = (
                one.round_trips_seconds,
                one.transfer_seconds,
                one.cloud_seconds,
                one.device_seconds,
                one.overhead_seconds,
                one.seconds,
            )
            rows.append([shape, name, *[f"{1e3 * part:.1f}" for part in parts]])
    return _table(["decoder", "plan", "round trips, ms", "transfer", "cloud", "device", "overhead", "all"], rows)


def _first_tokens() -> str:
    rows = []
    for shape in ("Llama-2-7B", "LLaMA-33B"):
        for name, plan in plans(SHAPES[shape]).items():
            one = first_token(Setup(SHAPES[shape], plan).on_device("int4"), PROMPT_TOKENS)
            parts = (one.transfer_seconds, one.cloud_seconds, one.device_seconds, one.seconds)
            rows.append([shape, name, *[f"{part:.2f}" for part in parts]])
    return _table(["decoder", "plan", "transfer, s", "cloud", "device", "all"], rows)


def _pairs(shape: DecoderShape) -> str:
    rows = []
    for gpu in GPUS:
        setups = [Setup(shape, plans(shape)["entry, front, shared 2048"], gpu, phone).on_device("int4") for phone in PHONES]
        rows.append([gpu.name, *[_rate(decode(setup).tokens_per_second if _fits(setup) else None) for setup in setups]])
    held = [_rate(1 / alone(shape, phone, "int4") if phone.holds(alone_work(shape, "int4").weight_bytes) else None) for phone in PHONES]
    return _table(["cloud", *[phone.name for phone in PHONES]], [*rows, ["all on the phone, int4", *held]])


def _fits(setup: Setup) -> bool:
    return setup.cloud.holds(cloud_work(setup, 1).weight_bytes) and setup.device.holds(device_work(setup, 1, 1).weight_bytes)


def _rate(tokens_per_second: float | None) -> str:
    return "does not fit" if tokens_per_second is None else f"{tokens_per_second:.1f}"


def with_tables(text: str) -> str:
    """The document with each table between its marks, `<!-- name -->` and `<!-- /name -->`, as it is now."""
    for name, table in tables().items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, stop, after = rest.partition(f"<!-- /{name} -->")
        if not stop:
            raise UsageError(f"the document has no place for the table {name!r}: put <!-- {name} --> and <!-- /{name} --> in it")
        text = f"{before}{start}\n{table}\n\n{stop}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the tables of docs/scaling.md.")
    parser.add_argument("--write", action="store_true", help="put them into the document instead")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables().items()))


if __name__ == "__main__":
    main()
