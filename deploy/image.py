"""Builds the container of the cloud half, tries it, and says what is in it.

    python deploy/image.py base                      a Debian base by debootstrap, where no registry can be reached
    python deploy/image.py build [--base IMAGE]      wheelhouse, then the image plora-cloud:VERSION
    python deploy/image.py smoke [--artifact DIR]    runs it as an operator would, and answers a device from outside
    python deploy/image.py sbom                      out/image/sbom.json (CycloneDX 1.6), docs/results/image.json (sizes)
    python deploy/image.py all                       the four of them

Run it with the project's own Python (`make install`). Everything it makes lies in out/image/ and in the engine's store.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deploy import base, engines, sbom, smoke  # noqa: E402

OUT = ROOT / "out" / "image"
DEFAULT_BASE = "docker.io/library/python:3.11-slim-bookworm"
PIP_VERSION = "26.3"
"""Never in the image: it installs the wheels there, out of its own wheel."""


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "build", "smoke", "sbom", "all"))
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), help="default: the first that works here")
    parser.add_argument("--base", metavar="IMAGE", help=f"default: {base.TAG} where `base` has made it, else {DEFAULT_BASE}")
    parser.add_argument("--tag", help="default: plora-cloud:VERSION")
    parser.add_argument(
        "--artifact", type=Path, metavar="DIR", help="smoke: an export (the folder of cloud/ and edge/), not a tiny new one"
    )
    parser.add_argument("--prompt", default=smoke.PROMPT, help="smoke: what the device asks")
    parser.add_argument("--mirror", metavar="URL", help="base: of Debian; default: debootstrap's own")
    parser.add_argument("--security", metavar="URL", help="base: of Debian's security updates; default: beside the mirror")
    parser.add_argument("--source", default="", metavar="URL", help="build: where the source is, for the label")
    parser.add_argument("--pip-flags", default="", metavar="FLAGS", help="build: for pip, e.g. an index with the CPU build of torch")
    given = parser.parse_args(words)
    tag = given.tag or f"plora-cloud:{version()}"
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        engine = engines.choose(given.engine)
        print(f"engine: {engine.name}", flush=True)
        if given.what in ("base", "all"):
            base.make_base(engine, OUT, given.mirror, given.security)
        base_tag = given.base or (base.TAG if engine.has(base.TAG) else DEFAULT_BASE)
        if given.what in ("build", "all"):
            build(engine, base_tag, tag, given.source, given.pip_flags.split())
        if given.what in ("smoke", "sbom") and not engine.has(tag):
            raise engines.DeployError(f"{engine.name} has no image {tag}: `build` makes it")
        if given.what in ("smoke", "all"):
            smoke.smoke(engine, tag, OUT, given.artifact, given.prompt)
        if given.what in ("sbom", "all"):
            sbom.write(engine, tag, base_tag, OUT, ROOT)
    except engines.DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # every `with` above has cleaned up
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def build(engine: engines.Engine, base_tag: str, tag: str, source: str, pip_flags: list[str]) -> None:
    if sys.version_info[:2] != (3, 11):
        raise engines.DeployError(f"Python {sys.version.split()[0]}: the wheelhouse is for 3.11, so run this with Python 3.11")
    context = OUT / "context"
    shutil.rmtree(context, ignore_errors=True)
    wheelhouse(context / "wheels", pip_flags)
    shutil.copy(ROOT / "deploy" / "slim.py", context)
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    revision = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    print(f"build: {tag} on {base_tag}", flush=True)
    arguments = {"BASE": base_tag, "VERSION": version(), "SOURCE": source, "REVISION": revision}
    engine.build(ROOT / "deploy" / "Dockerfile", context, tag, arguments)
    print(f"build: image {tag}", flush=True)


def wheelhouse(folder: Path, pip_flags: list[str]) -> None:
    """Our wheel and, at the versions of constraints.txt, the wheels of plora[cloud]."""
    folder.mkdir(parents=True)
    print("wheelhouse: our own wheel", flush=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what an older build left there
    engines.run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("plora-*.whl")
    print("wheelhouse: what it needs", flush=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--only-binary", ":all:", *pip_flags)
    wanted = (f"plora[cloud] @ {wheel.as_uri()}", f"pip=={PIP_VERSION}")
    engines.run(*pip, "--constraint", ROOT / "constraints.txt", "--dest", folder, *wanted)
    wheels = sorted(folder.glob("*.whl"))
    print(f"wheelhouse: {len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 1e6:.0f} MB", flush=True)
    if any(path.name.startswith("nvidia_") for path in wheels):
        print("wheelhouse: CUDA is in it, gigabytes; for a server without GPU give pip an index with torch's CPU build (--pip-flags)")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    sys.exit(main(sys.argv[1:]))
