"""Coverage-guided fuzzing of the wire, the cloud and the device, with atheris: `python -m bench.fuzz [--messages 1000000]`.

    codec      any bytes as frames to either machine, and to the decoder of tensors
    handshake  greetings, and greetings again, of one connection after another
    stream     a hostile device against the cloud's machine, every frame judged by a second statement of the rules (bench/fuzz_rules.py)
    service    hostile devices against the service, its room, scheduler and pool, beside one that must notice nothing
    device     the device's stepper, link and transport against a hostile cloud

A worker is a process for one target: atheris instruments the packages under test as they are imported, and ends the process by itself.
What breaks an invariant is written down once per place, as TARGET-HASH beside TARGET-HASH.txt, and the worker goes on; `--replay FILE`
repeats it, without atheris. Corpora are kept and grown from one campaign to the next with --corpus. atheris is no dependency of the
project: `pip install atheris==3.0.0`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from .conditions import ROOT, write_results

INSTRUMENTED = ["plora.protocol", "plora.artifact", "plora.cloud_server", "plora.device_runtime"]
REPORT_SECONDS = 2.0
"""Between a worker's reports: at most so much of its figures is lost with it."""
PRINT_SECONDS = 15.0
MOST_INPUT_BYTES = 4096
INPUT_SECONDS = 30
"""Of one input, after which it counts as a hang."""
RSS_MB = 4096
MOST_RESTARTS = 20
END_SECONDS = 10.0
"""For a worker to end once it was told to."""


@dataclass(frozen=True)
class Target:
    """module, function: of bench; seeds: a function of bench.fuzz_machines; share: of the messages, as workers are not equally fast."""

    module: str
    function: str
    seeds: str
    share: float

    def load(self) -> Callable[[bytes], int]:
        """Takes an input, returns how many messages were fed; raises for what must not be."""
        return getattr(import_module(f"bench.{self.module}"), self.function)


TARGETS = {
    "service": Target("fuzz_service", "service", "choice_seeds", 0.05),
    "codec": Target("fuzz_machines", "codec", "codec_seeds", 0.5),
    "handshake": Target("fuzz_machines", "handshake", "choice_seeds", 0.15),
    "stream": Target("fuzz_stream", "stream", "choice_seeds", 0.18),
    "device": Target("fuzz_device", "device", "choice_seeds", 0.12),
}


@dataclass
class Report:
    """Of one worker. crashes: how often, by place."""

    messages: int = 0
    inputs: int = 0
    seconds: float = 0.0
    crashes: dict[str, int] = field(default_factory=dict)


def seeds_of(name: str) -> list[bytes]:
    return getattr(import_module("bench.fuzz_machines"), TARGETS[name].seeds)()


# A crash


def place_of(error: BaseException) -> str:
    """Where it comes from, so that two of a kind count as one: the error's type, the innermost function of ours, the rule without its
    numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    inner = [frame for frame in ours if frame.name not in ("check", "_within")][-1:]
    where = f"{Path(inner[0].filename).name}:{inner[0].name}" if inner else "?"
    return f"{type(error).__name__} at {where}: {re.sub('[0-9a-f]*[0-9][0-9a-f]*', 'N', str(error))[:100]}"


def write_crash(folder: Path, name: str, data: bytes, error: BaseException) -> None:
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def replay(path: Path) -> int:
    """Repeats a crash. The target is the name's first word."""
    name = path.name.partition("-")[0]
    if name not in TARGETS:
        raise SystemExit(f"{path}: its name has to begin with a target, {', '.join(TARGETS)}")
    messages = TARGETS[name].load()(path.read_bytes())
    print(f"{path}: {messages} messages, and nothing is wrong")
    return 0


# A worker


def work(name: str, messages: int, seconds: int, corpus: Path, crashes: Path, report_path: Path) -> None:
    """Fuzzes one target until so many messages were fed, or for so long. Does not return: libFuzzer ends the process, or we do."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = TARGETS[name].load()
    report, began, parent = Report(), time.time(), os.getppid()
    written = [0.0]

    def write_report() -> None:
        written[0] = time.time()
        report.seconds = written[0] - began
        partial = report_path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
        partial.replace(report_path)

    def feed(data: bytes) -> None:
        report.inputs += 1
        try:
            report.messages += target(data)
        except Exception as error:
            place = place_of(error)
            if place not in report.crashes:
                write_crash(crashes, name, data, error)
                print(f"CRASH {place}", file=sys.stderr, flush=True)
            report.crashes[place] = report.crashes.get(place, 0) + 1
        over = report.messages >= messages or os.getppid() != parent
        if over or time.time() - written[0] > REPORT_SECONDS:
            write_report()
        if over:
            sys.stderr.flush()
            os._exit(0)

    write_report()
    flags = [f"-max_total_time={seconds}", f"-max_len={MOST_INPUT_BYTES}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={RSS_MB}"]
    atheris.Setup(
        [sys.argv[0], *flags, "-len_control=20", "-print_final_stats=0", f"-artifact_prefix={crashes}/{name}-", str(corpus)], feed
    )
    atheris.Fuzz()


# The campaign


@dataclass
class Worker:
    """A worker's process as the campaign sees it. edges: covered by the seeds, and now."""

    name: str
    process: subprocess.Popen[str]
    report_path: Path
    edges: list[int] = field(default_factory=list)
    reader: threading.Thread | None = None

    def read(self, stream: IO[str], log: Path) -> None:
        """libFuzzer's lines; those of crashes are shown."""
        with log.open("a", encoding="utf-8") as file:
            for line in stream:
                file.write(line)
                file.flush()
                if line.startswith("CRASH"):
                    print(f"{self.name}: {line.strip()}", flush=True)
                if (match := re.search(r"(INITED|NEW|REDUCE|pulse|DONE|RELOAD).* cov: (\d+)", line)) is not None:
                    covered = int(match[2])
                    self.edges = [covered if match[1] == "INITED" or not self.edges else self.edges[0], covered]

    def report(self) -> Report:
        try:
            return Report(**json.loads(self.report_path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Report()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Campaign:
    """messages, seconds: of each target, at most; folder: corpora, crashes and logs."""

    messages: dict[str, int]
    seconds: int
    folder: Path
    done: dict[str, Report] = field(default_factory=dict)
    edges: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def start(self, name: str) -> Worker:
        corpus = self.folder / "corpus" / name
        if not corpus.exists():
            corpus.mkdir(parents=True)
            for seed in seeds_of(name):
                (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
        before = self.done.get(name, Report())
        report_path = self.folder / f"{name}.json"
        report_path.unlink(missing_ok=True)
        left = [self.messages[name] - before.messages, max(1, self.seconds - int(before.seconds))]
        command = [sys.executable, "-m", "bench.fuzz", "--work", name, "--messages", str(left[0]), "--seconds", str(left[1])]
        command += ["--corpus", str(self.folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        worker = Worker(name, process, report_path)
        assert process.stderr is not None  # it was asked for
        worker.reader = threading.Thread(target=worker.read, args=(process.stderr, self.folder / f"{name}.log"), daemon=True)
        worker.reader.start()
        return worker

    def take(self, worker: Worker) -> bool:
        """A worker has ended: its figures count. Whether it is to go on, since something ended it that was no error of Python's."""
        if worker.reader is not None:
            worker.reader.join(END_SECONDS)
        name, report = worker.name, worker.report()
        before = self.done.setdefault(name, Report())
        before.messages += report.messages
        before.inputs += report.inputs
        before.seconds += report.seconds
        for place, count in report.crashes.items():
            before.crashes[place] = before.crashes.get(place, 0) + count
        if worker.edges:
            self.edges[name] = [self.edges.get(name, worker.edges)[0], worker.edges[1]]
        if worker.process.returncode == 0:
            return False
        failed = self.failures.setdefault(name, [])
        failed.append(f"the worker ended with {worker.process.returncode}, see {name}.log")
        print(f"{name}: {failed[-1]}", flush=True)
        return len(failed) < MOST_RESTARTS

    def run(self, workers: int) -> None:
        """As many at a time as asked for; Ctrl-C ends them, and what was done counts."""
        todo, running = list(self.messages), list[Worker]()
        printed = time.monotonic()
        try:
            while todo or running:
                while todo and len(running) < workers:
                    running.append(self.start(todo.pop(0)))
                time.sleep(0.2)
                for worker in [worker for worker in running if worker.process.poll() is not None]:
                    running.remove(worker)
                    if self.take(worker):
                        todo.insert(0, worker.name)
                if time.monotonic() - printed > PRINT_SECONDS:
                    printed = time.monotonic()
                    for worker in running:
                        print(self.line(worker.name, worker.report(), worker.edges), flush=True)
        except KeyboardInterrupt:
            print("stopping", flush=True)
        finally:
            for worker in running:
                worker.stop()
                worker.process.returncode = 0
                self.take(worker)

    def line(self, name: str, report: Report, edges: list[int]) -> str:
        pace = report.messages / max(report.seconds, 1e-9)
        found = len(self.done.get(name, Report()).crashes.keys() | report.crashes.keys())
        return (
            f"{name:9} {report.messages:9,} of {self.messages[name]:,} messages, {report.inputs:,} inputs, {report.seconds:.0f} s, "
            f"{pace:,.0f}/s, {'-'.join(map(str, edges))} edges, {found} crashes"
        )

    def figures(self) -> dict[str, Any]:
        targets = {}
        for name, report in self.done.items():
            start, end = self.edges.get(name, [0, 0])
            targets[name] = {
                "messages": report.messages,
                "inputs": report.inputs,
                "seconds": round(report.seconds, 1),
                "messages_per_second": round(report.messages / max(report.seconds, 1e-9)),
                "edges_covered_start": start,
                "edges_covered_end": end,
                "crashes": len(report.crashes) + len(self.failures.get(name, [])),
                "crash_places": {**report.crashes, **dict.fromkeys(self.failures.get(name, []), 1)},
            }
        totals = {key: sum(each[key] for each in targets.values()) for key in ("messages", "inputs", "crashes")}
        return {**totals, "targets": targets}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000, help="to feed in all, shared among the targets")
    parser.add_argument("--seconds", type=int, default=3600, help="for each target at most")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--corpus", type=Path, help="folder of corpora, crashes and logs; a new one if not given")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one, may be given again")
    parser.add_argument("--replay", type=Path, help="repeat one crash")
    parser.add_argument("--work", choices=list(TARGETS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.replay is not None:
        return replay(asked.replay)
    if asked.messages < 1 or asked.seconds < 1 or asked.workers < 1:
        parser.error("expected 1 and more messages, seconds and workers")
    if asked.work is not None:
        crashes = asked.corpus / "crashes"
        crashes.mkdir(exist_ok=True)
        work(asked.work, asked.messages, asked.seconds, asked.corpus / "corpus" / asked.work, crashes, asked.corpus / f"{asked.work}.json")
        return 0
    chosen = {name: TARGETS[name].share for name in asked.target or TARGETS}
    shares = {name: max(1, round(asked.messages * share / sum(chosen.values()))) for name, share in chosen.items()}
    folder = (asked.corpus or Path(tempfile.mkdtemp(prefix="plora-fuzz-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"corpora, crashes and logs in {folder}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has us ignore the first
        signal.signal(number, signal.default_int_handler)
    campaign = Campaign(shares, asked.seconds, folder)
    campaign.run(asked.workers)
    figures = campaign.figures()
    for name, report in campaign.done.items():
        print(campaign.line(name, report, campaign.edges.get(name, [])))
    command = f"python -m bench.fuzz --messages {asked.messages} --seconds {asked.seconds} --workers {asked.workers}"
    print(write_results("fuzz", figures, " ".join([command, *(f"--target {name}" for name in asked.target or [])])))
    return 1 if figures["crashes"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
