"""`make bench-soak`: an hour of mixed load against one cloud process, with cuts, kills and hostile peers. Are the answers right, and
what is left behind?

    python -m bench.soak [--minutes 60] [--devices 8] [--seed 0] [--out FOLDER] [--report-only]

Devices are real ones, in processes of two (bench/soak_device.py), each process behind a link of its own that is cut at random; now and
then a whole process is killed. Hostile peers come beside them (bench/soak_hostile.py). Every answer is held against what the same cloud
said to the same prompt over a quiet link. At the end all leave, and the server must hold what it held before the first one came.

FOLDER: an export with `cloud` and `edge`; by default a tiny random Llama with layers on the device and exchanges. Figures are in
out/soak/raw.json every five minutes; --report-only makes the report from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from plora.artifact.console import INTERRUPTED, interrupt
from plora.artifact.errors import UsageError
from plora.models.plan_flags import PlanChoice

from .conditions import ROOT, write_results
from .cuts import START_SECONDS, Cutter, make_tiny
from .link import LinkProcess, link_process
from .profiles import rtt_only
from .soak_plot import plot
from .soak_processes import Child, Deadlines, SoakServer
from .soak_report import faults, report, summary
from .soak_watch import Sample, Watched, leaks

SCRATCH = ROOT / "out" / "soak"
PLAN = {"soak": PlanChoice("grouped", ranks=(8,), group=1, front_layers=1, back_layers=1)}
"""First and last layer on the device, an exchange for each of the others."""
RTTS_MILLIS = (0, 20, 80)
"""Of the links, in turn."""
SESSIONS_OF_A_PROCESS = 2
CALM_SECONDS = 5.0
"""Between two cuts of one link: drawn evenly from 0 on."""
HOSTILE_RATE = 3.0
"""Peers a second."""
BEYOND = 1.3
"""A nap is so much longer than the deadline that it is to pass."""
SAMPLE_SECONDS, PROGRESS_SECONDS, SAVE_SECONDS = 10.0, 60.0, 300.0
LEAVE_SECONDS = 150.0
"""For a device's last answer, which a broken link may keep for give_up_seconds, and its good-bye."""
SETTLE_SECONDS = 100.0
"""Links keep connections that fell silent open for ever, as a network does; HTTP/2 finds that out by pings, the last after a minute."""
REST_SECONDS = 30.0
"""And when the links are gone, too, beyond the lease."""
MOST_MISTAKES = 20


@dataclass(frozen=True)
class Soak:
    """What to do. devices: sessions at a time; calm_seconds: between two cuts of one link, at the most; rate: of hostile peers a second;
    sample_seconds: between two looks at the server; settle_seconds: for it to be as before when all have left but the links;
    deadlines: the server's."""

    minutes: float = 60.0
    devices: int = 8
    seed: int = 0
    calm_seconds: float = CALM_SECONDS
    rate: float = HOSTILE_RATE
    sample_seconds: float = SAMPLE_SECONDS
    settle_seconds: float = SETTLE_SECONDS
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf or self.devices < 1:
            raise UsageError(f"a soak of {self.minutes:g} minutes with {self.devices} devices: need more than 0 of both")


# Findings


@dataclass
class Findings:
    """Counted as they come in, from any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    styles: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    surprises: Counter[str] = field(default_factory=Counter)
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    longest_answer_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def device(self, said: dict[str, Any]) -> None:
        with self.lock:
            if "error" in said:
                self.errors[said["error"]] += 1
                return
            own = ("tokens", "wrong_tokens", "near_ties", "other_bits", "reconnections", "replayed_tokens")
            self.counts.update({"answers": 1, f"{said['ending']}_answers": 1, **{name: said[name] for name in own}})
            self.styles[said["style"]] += said["ending"] == "finished"
            self.longest_answer_seconds = max(self.longest_answer_seconds, said["seconds"])
            if "mistake" in said and len(self.mistakes) < MOST_MISTAKES:
                self.mistakes.append({"style": said["style"], "ending": said["ending"], **said["mistake"]})

    def stranger(self, said: dict[str, Any]) -> None:
        with self.lock:
            self.hostile[said["kind"]] += 1
            if said["surprise"]:
                self.surprises[f"{said['kind']}: {said['got']}"] += 1

    def as_dict(self) -> dict[str, Any]:
        with self.lock:
            counters = ("counts", "styles", "errors", "hostile", "surprises")
            return {
                **{name: dict(getattr(self, name)) for name in counters},
                "mistakes": list(self.mistakes),
                "longest_answer_seconds": self.longest_answer_seconds,
            }


class Run:
    """One soak: everything that it started, and what was found."""

    def __init__(self, soak: Soak, out: Path, scratch: Path, save: Path | None) -> None:
        """out: an export; scratch: for what children write; save: where figures are kept while it goes on."""
        self.soak, self.out, self.scratch, self.save_to = soak, out, scratch, save
        self.findings = Findings()
        self.samples: list[Sample] = []
        self.cutters: list[Cutter] = []
        self.devices: list[Child] = []
        self.links: list[LinkProcess] = []
        self.hostile: list[Child] = []
        self.raw: dict[str, Any] = {"soak": asdict(soak), "ended": "running"}

    def go(self) -> dict[str, Any]:
        """Until the time is up or Ctrl-C comes; either way all is ended and looked at in good order."""
        server = SoakServer(self.out / "cloud", self.soak.devices, self.soak.deadlines, self.scratch / "server.log")
        try:
            self._soak(server)
        finally:
            for child in (*self.devices, *self.hostile):
                if child.process.poll() is None:  # something broke on the way here
                    child.stop(signal.SIGKILL)
            with suppress(ProcessLookupError):
                server.stop(signal.SIGTERM)
            started = {server.process.pid, *(link.pid for link in self.links), *(p for c in (*self.devices, *self.hostile) for p in c.pids)}
            left = [child.pid for child in psutil.Process().children(recursive=True) if child.pid in started]
            self.raw.update(server_exit_code=server.process.returncode, server_failures=server.failures(), processes_left=len(left))
            self.save()
        return self.raw

    def _soak(self, server: SoakServer) -> None:
        watched = Watched(server.process.pid, server.ops)
        before = watched.settle(1.0, REST_SECONDS)
        self.raw.update(metrics=server.ops is not None, before=asdict(before))
        with ExitStack() as stack:
            try:
                truth = self._record(server, stack)
                self.raw["recorded"] = asdict(watched.settle(1.0, REST_SECONDS, lambda sample: not sample.sessions))
                self._begin(server, truth, stack)
                watched.began = time.monotonic()
                self._watch(server, watched)
                self.raw["ended"] = "in time"
            except KeyboardInterrupt:
                self.raw["ended"] = "interrupted"
            finally:
                self._end()
            patience = self.soak.settle_seconds if self.raw["ended"] == "in time" else 0.0
            after = watched.settle(0.0, patience, lambda now: left_nothing(before, now))
            self.raw["after_with_links"] = asdict(after)
        lease_seconds = self.soak.deadlines.lease_seconds
        after = watched.settle(lease_seconds + 1, lease_seconds + REST_SECONDS, lambda now: left_nothing(before, now))
        self.raw.update(after=asdict(after), **leaks(before, after))

    def _record(self, server: SoakServer, stack: ExitStack) -> Path:
        truth = self.scratch / "truth.json"
        with link_process(server.address, rtt_only(0)) as link:
            request = {"record": {"edge": str(self.out / "edge"), "address": link.address, "file": str(truth)}}
            recorder = Child("soak_device", lambda _: request, lambda said: None, self.scratch / "record.log")
            stack.callback(recorder.wait, START_SECONDS)
            if not recorder.wait(START_SECONDS) or recorder.process.returncode:
                raise RuntimeError(f"the undisturbed answers were not recorded; {recorder.log} says why")
        return truth

    def _begin(self, server: SoakServer, truth: Path, stack: ExitStack) -> None:
        soak, edge = self.soak, str(self.out / "edge")
        naps = [BEYOND * seconds for seconds in (soak.deadlines.quiet_seconds, soak.deadlines.lease_seconds, soak.deadlines.idle_seconds)]
        for index, first in enumerate(range(0, soak.devices, SESSIONS_OF_A_PROCESS)):
            link = stack.enter_context(link_process(server.address, rtt_only(RTTS_MILLIS[index % len(RTTS_MILLIS)]), soak.seed + index))
            self.links.append(link)
            fields = {
                "address": link.address, "edge": edge, "truth": str(truth), "naps_seconds": naps,
                "sessions": min(SESSIONS_OF_A_PROCESS, soak.devices - first),
            }  # fmt: skip
            name = f"{soak.seed} {index}"
            device = Child(
                "soak_device",
                lambda starts, fields=fields, name=name: {"devices": {**fields, "seed": f"{name} {starts}"}},  # type: ignore[misc]
                self.findings.device,
                self.scratch / f"devices-{index}.log",
            )
            self.devices.append(device)
            cutter = Cutter(device, link, random.Random(f"{soak.seed} {index}"), soak.calm_seconds)  # type: ignore[arg-type]  killed alike
            cutter.generating.set()
            self.cutters.append(cutter)
        request = {"address": server.address, "edge": edge, "rate": soak.rate, "seed": f"{soak.seed}"}
        self.hostile.append(Child("soak_hostile", lambda _: request, self.findings.stranger, self.scratch / "hostile.log"))
        for cutter in self.cutters:
            cutter.start()

    def _watch(self, server: SoakServer, watched: Watched) -> None:
        soak, began = self.soak, time.monotonic()
        sampled = said = saved = began
        while (now := time.monotonic()) < began + 60 * soak.minutes:
            time.sleep(max(0.0, min(sampled + soak.sample_seconds, began + 60 * soak.minutes) - now))
            if server.process.poll() is not None:
                raise RuntimeError(f"the cloud ended with {server.process.returncode} in the middle of it; {server.complaints} says why")
            if failed := [cutter.error for cutter in self.cutters if cutter.error is not None]:
                raise failed[0]
            for child in (*self.devices, *self.hostile):
                self.findings.counts["child_crashes"] += child.restart_if_dead()
            sampled = now = time.monotonic()
            self.samples.append(watched.sample())
            if now - said >= PROGRESS_SECONDS:
                said = now
                print(self.progress(), flush=True)
            if now - saved >= SAVE_SECONDS:
                saved = now
                self.save()

    def progress(self) -> str:
        sample, found = self.samples[-1], self.findings.as_dict()
        counts = Counter(found["counts"])
        sessions = "" if sample.sessions is None else f"{sample.sessions} sessions, "
        return (
            f"{sample.minutes:.0f} min: {sessions}{counts['answers']:,} answers, {counts['wrong_tokens']} wrong tokens, "
            f"{counts['near_ties']} near ties, {sum(found['errors'].values())} errors, "
            f"{sum(each.kinds.total() for each in self.cutters)} cuts, {sum(found['hostile'].values())} hostile peers, "
            f"{sample.rss_bytes / 1e6:.1f} MB, {sample.descriptors} descriptors"
        )

    def _end(self) -> None:
        """All leave: the links hold from now on, the last devices are killed, the others say good-bye. After Ctrl-C, of which links have
        heard, too, all devices are killed."""
        for cutter in self.cutters:
            cutter.done = True
        for cutter in self.cutters:
            if cutter.ident is not None:
                cutter.join(2 * START_SECONDS)
        first_killed = 0 if self.raw["ended"] == "interrupted" else -1
        leaving = [*self.devices[:first_killed], *self.hostile]
        for child in leaving:
            child.leave()
        for child in self.devices[first_killed:]:
            child.stop(signal.SIGKILL)
            self.findings.counts["device_kills"] += 1
        self.findings.counts["stuck_processes"] += sum([not child.wait(LEAVE_SECONDS) for child in leaving])

    def save(self) -> None:
        kinds: Counter[str] = sum((cutter.kinds for cutter in self.cutters), Counter())
        self.raw.update(self.findings.as_dict(), cuts=dict(kinds), samples=[asdict(sample) for sample in self.samples])
        if self.save_to is not None:
            self.save_to.parent.mkdir(parents=True, exist_ok=True)
            part = self.save_to.with_suffix(".part")
            part.write_text(json.dumps(self.raw) + "\n", encoding="utf-8")
            part.replace(self.save_to)


def left_nothing(before: Sample, now: Sample) -> bool:
    return not any(leaks(before, now).values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N")
    parser.add_argument("--devices", type=int, default=8, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="an export, instead of the tiny one")
    parser.add_argument("--report-only", action="store_true", help="from out/soak/raw.json of the last run")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, interrupt)
    raw_path = SCRATCH / "raw.json"
    if not arguments.report_only:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        soak = Soak(arguments.minutes, arguments.devices, arguments.seed)
        with tempfile.TemporaryDirectory(prefix="plora-soak-") as folder:
            out = arguments.out or make_tiny(Path(folder), PLAN)["soak"]
            run = Run(soak, out, SCRATCH, raw_path)
            raw = run.go()
            if raw["ended"] == "interrupted":
                print(summary(report(raw)))
                sys.exit(INTERRUPTED)
    figures = report(json.loads(raw_path.read_text(encoding="utf-8")))
    print(summary(figures))
    print(write_results("soak", figures, " ".join(["python -m bench.soak", *sys.argv[1:]])), plot(figures))
    if found := faults(figures):
        sys.exit(f"not as it should be: {', '.join(found)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before there was anything to report, or again while all was being ended
        sys.exit(INTERRUPTED)
