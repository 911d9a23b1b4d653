"""`make bench-cuts`: a thousand cuts while generating, of every kind and at any moment, also in the middle of a recovery. Are the tokens
those of an undisturbed run? And how long after the link's return does the next token come?

    python -m bench.cuts [--cuts 1000] [--trials 20] [--out FOLDER …]

FOLDER: an export with `cloud` and `edge`; by default two of a tiny random Llama, made on the spot: one round trip per token with layers on
the device, and two exchanges. What it computes does not change what a cut does to it, and a tiny one spends its time being cut.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plora.artifact.errors import PloraError, UsageError
from plora.models.plan_flags import PlanChoice

from .conditions import write_results
from .link import KINDS, LinkProcess, link_process
from .plans import make_adapter
from .processes import BIN
from .profiles import rtt_only
from .prompts import CODE, ITEMS, PASSAGE

if TYPE_CHECKING:
    from plora.device_runtime import PrivateSession

PLANS = {
    "entry": PlanChoice("entry", ranks=(8,), front_layers=1, back_layers=1, shared_injection=16),
    "grouped": PlanChoice("grouped", ranks=(8,), group=2),
}
LAYERS, VOCABULARY, CONTEXT_TOKENS = 4, 400, 1024
CORE_SIZE = 0.5
RTTS_MILLIS = {0: 0.4, 20: 0.4, 80: 0.2}
"""And each one's share of the cuts: where a round trip is long, a recovery is, too."""
NEW_TOKENS = 32
LONGEST_SECONDS = 0.3
"""Of a cut or stall: drawn evenly from 0 on."""
CALM_SECONDS, CALM_RTTS = 0.4, 5
"""Between two cuts: drawn evenly from 0 to so many seconds and round trips, so that many fall into the recovery from the one before."""
AHEAD_MESSAGES = 12
"""A cut at a message comes so many later at most."""
SHARES = {"reset": 0.28, "silence": 0.28, "stall": 0.2, "at message": 0.22, "kill": 0.02}
"""Of the cuts. at message: by reset or silence, delivered or not; kill: of the server, and another one on the same port."""
NEAR_TIE = 1e-3
"""Of the two best logits (design, part 4): another batch shape may turn the choice there."""
WITHIN_SECONDS = 0.3
"""The goal for the next token, beyond three round trips from the link's return."""
START_SECONDS = 60


# Halves and servers


def make_tiny(folder: Path, plans: dict[str, PlanChoice] = PLANS) -> dict[str, Path]:
    """A random Llama, its tokenizer, and an export of it for each plan."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from plora.export.config import ExportConfig
    from plora.export.halves import write_halves
    from plora.models.checkpoint import read_base

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", "<begin>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PASSAGE, CODE, ITEMS], trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=False, initializer_range=0.15,
        eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    whole.save_pretrained(folder / "base")
    base = read_base(str(folder / "base"))
    outs = {}
    for name, choice in plans.items():
        make_adapter(base, choice, folder / f"{name}-adapter", CORE_SIZE)
        outs[name] = folder / name
        outs[name].mkdir()
        write_halves(ExportConfig(str(folder / "base"), folder / f"{name}-adapter", outs[name]), outs[name], lambda stage: None)
    return outs


class Server:
    """`plora-cloud serve`, which can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        listen = ["--listen", self.address, "--threads", "1", "--kv-bytes", str(256 << 20), "--context", str(CONTEXT_TOKENS)]
        command = [str(BIN / "plora-cloud"), "serve", str(self.folder), *listen]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"listening on \S+:(\d+)", line):
                self.port = int(match[1])
                return
        raise RuntimeError(f"{self.folder}: the cloud ended before it listened")

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(START_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def server_of(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.stop(signal.SIGTERM)


@contextmanager
def talk(folder: Path, rtt_millis: float, drafts: bool, seed: int) -> Iterator[tuple[Server, LinkProcess, PrivateSession]]:
    """A session over a link, whose answers always have as many tokens as are asked for."""
    from plora.device_runtime import open_session
    from plora.device_runtime.drafts import NgramDrafts

    with (
        server_of(folder / "cloud") as server,
        link_process(server.address, rtt_only(rtt_millis), seed) as link,
        open_session(folder / "edge", link.address, drafter=NgramDrafts() if drafts else None) as session,
    ):
        session.text.defaults = dataclasses.replace(session.text.defaults, eos_token_ids=())
        yield server, link, session


# The campaign


@dataclass(frozen=True)
class Undisturbed:
    """prompt: token ids; gaps: between the two best logits for each of the tokens."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


def undisturbed(session: PrivateSession) -> list[Undisturbed]:
    """Prompts from a few tokens to several steps', answered over a link that works."""
    seen: list[Any] = []
    real = session._logits

    def noted(ids: list[int], rows: int, position: int) -> Any:
        logits = real(ids, rows, position)
        seen.append(logits[-1])
        return logits

    session._logits = noted  # type: ignore[method-assign]
    texts = ["The ferry", CODE[:80], ITEMS, PASSAGE[:120], PASSAGE[:700], CODE]
    answers = []
    for text in texts:
        prompt = session.text.encode_raw(text)[: CONTEXT_TOKENS - 2 * NEW_TOKENS]
        session.forget()
        seen.clear()
        tokens = generate(session, prompt, [])
        gaps = [float(best[1] - best[0]) for best in (np.partition(logits, -2)[-2:] for logits in seen)]
        answers.append(Undisturbed(prompt, tokens, gaps))
    session._logits = real  # type: ignore[method-assign]
    return answers


def generate(session: PrivateSession, prompt: list[int], stamps: list[float]) -> list[int]:
    """stamps: when each token came, time.perf_counter."""
    tokens = []
    for piece in session.stream(prompt, session.sampling(max_tokens=NEW_TOKENS, temperature=0.0)):
        tokens.append(piece.token_id)
        stamps.append(time.perf_counter())
    return tokens


@dataclass
class Tally:
    """kinds: of cuts; wrong: cuts in answers with tokens that are neither right nor nearly tied."""

    kinds: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @property
    def cuts(self) -> int:
        return self.kinds.total()

    def judge(self, tokens: list[int], wanted: Undisturbed, cuts: int) -> None:
        self.figures.update(generations=1, tokens=len(tokens), cuts_with_wrong_tokens=0)
        if tokens == wanted.tokens:
            return
        first = next((at for at, pair in enumerate(zip(tokens, wanted.tokens, strict=False)) if pair[0] != pair[1]), len(tokens))
        if len(tokens) == len(wanted.tokens) and wanted.gaps[first] < NEAR_TIE:
            self.figures["near_ties"] += 1
            return
        self.figures.update(generations_with_wrong_tokens=1, cuts_with_wrong_tokens=cuts)
        for kind, *at in difflib.SequenceMatcher(None, wanted.tokens, tokens, autojunk=False).get_opcodes():
            here, there = at[1] - at[0], at[3] - at[2]
            name = {"delete": "tokens_lost", "insert": "tokens_doubled", "replace": "tokens_changed"}.get(kind)
            if name is not None:
                self.figures[name] += max(here, there)


class Cutter(threading.Thread):
    """Cuts the link at random moments for as long as `generating` is set."""

    def __init__(self, server: Server, link: LinkProcess, generator: random.Random, calm_seconds: float) -> None:
        super().__init__(name="cutter", daemon=True)
        self.server, self.link, self.random = server, link, generator
        self.calm_seconds = calm_seconds
        self.kinds: Counter[str] = Counter()
        self.generating = threading.Event()
        self.done = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.done:
                time.sleep(self.random.uniform(0, self.calm_seconds))
                if self.generating.wait(0.1):
                    self.cut(*self.random.choices(list(SHARES), list(SHARES.values())))
        except BaseException as error:
            self.error = error

    def cut(self, kind: str) -> None:
        seconds = self.random.uniform(0, LONGEST_SECONDS)
        if kind == "stall":
            self.link.stall(seconds)
        elif kind == "kill":
            self.server.stop(signal.SIGKILL)
            self.server.start()
        elif kind in KINDS:
            self.link.cut(kind, seconds)
        else:
            self._cut_at_message(seconds)
            return
        self.kinds[kind] += 1

    def _cut_at_message(self, seconds: float) -> None:
        how, delivered = self.random.choice(KINDS), self.random.random() < 0.5
        before = self.link.counters()
        message = before.up_messages + before.down_messages + 1 + self.random.randrange(AHEAD_MESSAGES)
        try:
            self.link.cut_at_message(message, how, seconds, deliver=delivered)
        except UsageError:  # it has crossed meanwhile
            return
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not self.done:
            if self.link.counters().cuts > before.cuts:
                self.kinds[f"{how} at a message, {'delivered' if delivered else 'lost'}"] += 1
                return
            time.sleep(0.01)


def campaign(folder: Path, rtt_millis: float, drafts: bool, wanted_cuts: int, seed: int, tally: Tally) -> None:
    """Answers prompts over a link that is cut until so many cuts have happened."""
    generator = random.Random(seed)
    with talk(folder, rtt_millis, drafts, seed) as (server, link, session):
        answers = undisturbed(session)
        cutter = Cutter(server, link, generator, CALM_SECONDS + CALM_RTTS * rtt_millis / 1000)
        cutter.start()
        while cutter.kinds.total() < wanted_cuts and cutter.error is None:
            one = generator.choice(answers)
            if generator.random() < 0.7:
                session.forget()
            before = cutter.kinds.total()
            cutter.generating.set()
            try:
                tokens = generate(session, one.prompt, [])
                tally.judge(tokens, one, cutter.kinds.total() - before)
            except PloraError as error:
                tally.errors.append(f"{type(error).__name__}: {error}")
            finally:
                cutter.generating.clear()
        cutter.done = True
        cutter.join(2 * START_SECONDS)
        if cutter.error is not None:
            raise cutter.error
        tally.kinds += cutter.kinds
        tally.figures["reconnections"] += session._link.reconnections
        tally.figures["replayed_tokens"] += session._stepper.counters.replayed_tokens


# Recovery


def recovery(folder: Path, rtt_millis: float, trials: int, seed: int) -> dict[str, Any]:
    """From the link's return to the next token, beyond three round trips, by kind of cut."""
    generator = random.Random(seed)
    figures = {}
    with talk(folder, rtt_millis, False, seed) as (_, link, session):
        prompt = session.text.encode_raw("The ferry")
        stamps: list[float] = []
        generate(session, prompt, stamps)
        usual = statistics.median(after - before for before, after in zip(stamps[1:], stamps[2:], strict=False))
        for kind in (*KINDS, "stall"):
            beyond = [_next_token(session, prompt, link, kind, generator) - 3 * rtt_millis / 1000 for _ in range(trials)]
            figures[kind] = {
                "trials": trials,
                "median_millis_beyond_3_rtt": 1000 * statistics.median(beyond),
                "p95_millis_beyond_3_rtt": 1000 * float(np.quantile(beyond, 0.95)),
                "longest_millis_beyond_3_rtt": 1000 * max(beyond),
                "share_within_3_rtt_and_300_ms": sum(one <= WITHIN_SECONDS for one in beyond) / trials,
            }
    return {"undisturbed_token_millis": 1000 * usual, "plan_round_trips": session.edge.plan.round_trips, **figures}


def _next_token(session: PrivateSession, prompt: list[int], link: LinkProcess, kind: str, generator: random.Random) -> float:
    """One cut at a random moment of an answer. Seconds from the link's return to the first token after it."""
    back: list[float] = []

    def cut(wait_seconds: float, seconds: float) -> None:
        time.sleep(wait_seconds)
        back.append(link.stall(seconds) if kind == "stall" else link.cut(kind, seconds))

    while True:
        stamps: list[float] = []
        session.forget()
        stream = session.stream(prompt, session.sampling(max_tokens=CONTEXT_TOKENS // 2, temperature=0.0))
        next(stream)
        thread = threading.Thread(target=cut, args=(generator.uniform(0.02, 0.2), generator.uniform(0, LONGEST_SECONDS)))
        thread.start()
        for _ in stream:
            stamps.append(time.perf_counter())
            if back and stamps[-1] > back[0]:
                thread.join()
                return stamps[-1] - back[0]
        thread.join()  # the answer was over before the link was back
        back.clear()


# All of it

COUNTS = (
    "generations", "tokens", "reconnections", "replayed_tokens", "cuts_with_wrong_tokens", "generations_with_wrong_tokens", "near_ties",
    "tokens_lost", "tokens_doubled", "tokens_changed",
)  # fmt: skip


def campaigns(outs: dict[str, Path], cuts: int) -> dict[str, Any]:
    tally = Tally()
    parts = [(name, rtt, share / len(outs)) for rtt, share in RTTS_MILLIS.items() for name in outs]
    wanted = 0.0
    for index, (name, rtt, share) in enumerate(parts):
        wanted += share * cuts
        campaign(outs[name], rtt, index % 2 == 0, math.ceil(wanted - tally.cuts), index, tally)
        wrong, answers = tally.figures["cuts_with_wrong_tokens"], tally.figures["generations"]
        errors = f"{len(tally.errors)} errors"
        print(f"{name} at {rtt:g} ms: {tally.cuts} cuts in all, {answers} answers, {wrong} with wrong tokens, {errors}", flush=True)
    counts = {name: tally.figures[name] for name in COUNTS}
    return {"cuts": tally.cuts, **counts, "by_kind": dict(tally.kinds), "errors": tally.errors}


def recoveries(outs: dict[str, Path], trials: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, folder in outs.items():
        figures[name] = {}
        for rtt in RTTS_MILLIS:
            figures[name][f"{rtt:g}"] = found = recovery(folder, rtt, trials, rtt)
            for kind in (*KINDS, "stall"):
                print(f"{name} at {rtt:g} ms, {kind}: next token {line(found[kind])}", flush=True)
    return figures


def line(found: dict[str, float]) -> str:
    median, p95 = found["median_millis_beyond_3_rtt"], found["p95_millis_beyond_3_rtt"]
    return f"{median:+.0f} ms beyond 3 RTT (p95 {p95:+.0f}), {100 * found['share_within_3_rtt_and_300_ms']:.0f} % within 300"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cuts", type=int, default=1000, metavar="N")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="of each kind of cut at each RTT")
    parser.add_argument("--out", type=Path, action="append", default=[], metavar="FOLDER", help="instead of the tiny ones; may be repeated")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="plora-cuts-") as scratch:
        outs = {folder.name: folder for folder in arguments.out} or make_tiny(Path(scratch))
        figures = {
            "model": ", ".join(map(str, arguments.out)) or f"random Llama, {LAYERS} layers of 64; plans: {PLANS}",
            "cut_seconds": [0, LONGEST_SECONDS],
            "shares": SHARES,
            **campaigns(outs, arguments.cuts),
            "recovery": recoveries(outs, arguments.trials),
        }
    figures["seconds"] = time.perf_counter() - began
    command = " ".join(["python -m bench.cuts", *sys.argv[1:]])
    print(f"{figures['cuts']} cuts, {figures['cuts_with_wrong_tokens']} with wrong tokens: {write_results('cuts', figures, command)}")


if __name__ == "__main__":
    main()
