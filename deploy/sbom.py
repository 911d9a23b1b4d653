"""What is in the image: a bill of materials (CycloneDX 1.6) read out of its files, and sizes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import venv
from pathlib import Path
from typing import Any

from .base import tree_bytes
from .engines import DeployError, Engine, run

TOOL = "cyclonedx-bom==7.5.0"
PREFIX = "opt/plora"
LARGEST = 8
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(str(wrong)[:2000] if wrong else 0)
"""


def write(engine: Engine, tag: str, base_tag: str, scratch: Path, root: Path) -> None:
    """Writes sbom.json into scratch, and counts, licences and sizes into docs/results/image.json."""
    print(f"sbom: {TOOL}", flush=True)
    tool = environment(scratch / "cyclonedx")
    with engine.files(tag) as files:
        python = python_components(tool, files, scratch)
        debian = debian_components(files)
        sizes = image_sizes(files)
    with engine.files(base_tag) as files:
        sizes["base_bytes"] = tree_bytes(files)
    bill = merged(python, debian, tag)
    path = scratch / "sbom.json"
    path.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
    run(tool / "python", "-c", VALIDATE, path)
    counts = {"python_components": len(python["components"]), "debian_components": len(debian)}
    print(
        f"sbom: {path.relative_to(root)}, valid; {counts['python_components']} Python, {counts['debian_components']} Debian packages",
        flush=True,
    )

    from bench.conditions import write_results

    figures = {
        "image": tag,
        "base": base_tag,
        "engine": engine.name,
        "sizes": sizes,
        "sbom": {**counts, "tool": TOOL, "python_licences": licences(python["components"])},
    }
    written = write_results("image", figures, "python deploy/image.py all")
    megabytes = {name: f"{size / 1e6:.0f} MB" for name, size in sizes.items() if isinstance(size, int)}
    print(
        f"sbom: {written.relative_to(root)}: " + ", ".join(f"{name.removesuffix('_bytes')} {size}" for name, size in megabytes.items()),
        flush=True,
    )


def environment(folder: Path) -> Path:
    """A scratch environment with the tool; its bin folder."""
    if not (folder / "bin" / "cyclonedx-py").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        run(folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", TOOL)
    return folder / "bin"


def python_components(tool: Path, files: Path, scratch: Path) -> dict[str, Any]:
    """CycloneDX of the environment in the image. The tool asks an interpreter for its path; the image's own would not start outside
    of it, so a script answers in its stead."""
    (packages,) = (files / PREFIX).glob("lib/python3.*/site-packages")
    stand_in = scratch / "image-python"
    stand_in.write_text(f"#!{sys.executable}\nimport json\nprint(json.dumps(['', {str(packages)!r}]))\n")
    stand_in.chmod(0o755)
    try:
        bill = json.loads(run(tool / "cyclonedx-py", "environment", "--spec-version", "1.6", "--output-format", "JSON", stand_in))
    finally:
        stand_in.unlink()
    for component in bill["components"]:
        if component["name"] == "plora":
            component.pop("purl", None)  # built here, in no index
    return bill


def debian_components(files: Path) -> list[dict[str, Any]]:
    """From dpkg's status; and Python itself where it is no Debian package, as in Docker's python images."""
    release = re.search(r'^VERSION_ID="?(\d+)', (files / "etc/os-release").read_text(encoding="utf-8"), re.MULTILINE)
    distribution = f"debian-{release[1]}" if release else "debian"
    components = []
    for paragraph in (files / "var/lib/dpkg/status").read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") != "install ok installed":
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        purl = f"pkg:deb/debian/{name}@{urllib.parse.quote(version, safe='~')}?arch={architecture}&distro={distribution}"
        component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        if "Maintainer" in fields:
            component["supplier"] = {"name": fields["Maintainer"].partition(" <")[0]}
        source = fields.get("Source", name).partition(" ")[0]
        components.append({**component, "properties": [{"name": "debian:source", "value": source}]})
    header = files / "usr/local/include/python3.11/patchlevel.h"
    if header.exists() and (found := re.search(r'PY_VERSION\s+"([^"]+)"', header.read_text(encoding="utf-8"))):
        purl = f"pkg:generic/python@{found[1]}"
        components.append({"type": "application", "bom-ref": purl, "name": "python", "version": found[1], "purl": purl})
    return components


def merged(python: dict[str, Any], debian: list[dict[str, Any]], tag: str) -> dict[str, Any]:
    """One bill whose subject is the image, which depends on everything."""
    name, _, version = tag.rpartition("/")[2].rpartition(":")
    image = {"type": "container", "bom-ref": "image", "name": name, "version": version, "licenses": [{"license": {"id": "Apache-2.0"}}]}
    components = [*python["components"], *debian]
    references = [component["bom-ref"] for component in components]
    if len(set(references)) != len(references):
        raise DeployError("two components of the bill have one reference")
    needs = [{"ref": "image", "dependsOn": sorted(references)}, *python.get("dependencies", [])]
    metadata = {**python.get("metadata", {}), "component": image}
    return {**python, "metadata": metadata, "components": components, "dependencies": needs}


def licences(components: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Python packages by licence, as their own metadata say it."""
    table: dict[str, list[str]] = {}
    for component in components:
        said = [
            entry.get("expression") or entry["license"].get("id") or entry["license"]["name"].rpartition(" :: ")[2]
            for entry in component.get("licenses", [])
        ]
        table.setdefault(" and ".join(sorted(set(said))) or "not said", []).append(component["name"])
    return {name: sorted(table[name]) for name in sorted(table)}


def image_sizes(files: Path) -> dict[str, Any]:
    """Bytes of regular files; gzip_bytes is about what a pull moves."""
    print("sbom: sizes", flush=True)
    environment = files / PREFIX
    (packages,) = environment.glob("lib/python3.*/site-packages")
    folders = {path.name: tree_bytes(path) for path in packages.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    packed = subprocess.Popen(["tar", "--create", "--directory", files, "."], stdout=subprocess.PIPE)
    squeezed = subprocess.Popen(["gzip", "-6"], stdin=packed.stdout, stdout=subprocess.PIPE)
    assert packed.stdout is not None and squeezed.stdout is not None
    packed.stdout.close()
    gzip_bytes = 0
    while block := squeezed.stdout.read(1 << 20):
        gzip_bytes += len(block)
    if packed.wait() or squeezed.wait():
        raise DeployError("tar | gzip of the image's files failed")
    return {
        "image_bytes": tree_bytes(files),
        "gzip_bytes": gzip_bytes,
        "environment_bytes": tree_bytes(environment),
        "largest_packages_bytes": dict(sorted(folders.items(), key=lambda entry: -entry[1])[:LARGEST]),
        **{f"slimmed_{name}": value for name, value in json.loads((environment / "slimmed.json").read_text()).items()},
    }
