"""What lies on disk is not trusted: manifests decode strictly, files are what was recorded, folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.artifact import folders
from plora.artifact.errors import ArtifactError, DamagedFile, ManifestError, MissingFile, PlanError, PloraError, UsageError
from plora.artifact.folders import check_new, new_file, new_folder
from plora.artifact.hashes import FileRecord, record_files
from plora.artifact.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    CloudManifest,
    EdgeManifest,
    check_files,
    read_manifest,
    require_file,
    write_json,
)
from plora.artifact.names import CLOUD_GRAPH
from plora.artifact.strict import decode

from .conftest import Made

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def cloud_folder(made: Made, tmp_path: Path) -> Path:
    """A copy of the cloud half that a test may damage."""
    return Path(shutil.copytree(made.out / "cloud", tmp_path / "cloud"))


@pytest.fixture
def edge_folder(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.out / "edge", tmp_path / "edge"))


def edit(folder: Path, change: Edit) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    (folder / MANIFEST).write_text(json.dumps(value))


def test_an_export_is_read_as_it_was_written(cloud_folder: Path, edge_folder: Path) -> None:
    cloud, edge = read_manifest(CloudManifest, cloud_folder), read_manifest(EdgeManifest, edge_folder)
    check_files(cloud_folder, cloud)
    check_files(edge_folder, edge)
    assert cloud.contract == edge.contract
    assert cloud.contract_hash == edge.contract_hash == cloud.contract.hash
    assert require_file(cloud, cloud_folder, CLOUD_GRAPH) == cloud_folder / CLOUD_GRAPH
    for folder, manifest in ((cloud_folder, cloud), (edge_folder, edge)):
        assert record_files(folder, manifest.files) == manifest.files
        before = (folder / MANIFEST).read_bytes()
        write_json(folder / MANIFEST, manifest)
        assert (folder / MANIFEST).read_bytes() == before


REFUSED: dict[str, tuple[Edit, type[PloraError], str]] = {
    "unknown key": (lambda m: m.update(extra=1), ManifestError, r"manifest\.json\.extra: unknown key; known: format, "),
    "unknown key inside": (lambda m: m["contract"]["shape"].update(extra=1), ManifestError, r"\.contract\.shape\.extra: unknown key"),
    "missing key": (lambda m: m.pop("dtype"), ManifestError, r"manifest\.json\.dtype: missing key"),
    "missing key inside": (lambda m: m["contract"]["plan"]["sources"][1].pop("ranks"), ManifestError, r"\.sources\[1\]\.ranks: missing"),
    "string for a number": (lambda m: m["contract"]["plan"].update(layers="3"), ManifestError, r"\.layers: got '3' \(str\), expected int"),
    "truth value for a number": (lambda m: m["contract"]["plan"].update(layers=True), ManifestError, r"\.layers: got True \(bool\)"),
    "float for an integer": (lambda m: m["contract"]["shape"].update(heads=6.0), ManifestError, r"\.heads: got 6\.0 \(float\)"),
    "number for a string": (lambda m: m.update(made_by=1), ManifestError, r"\.made_by: got 1 \(int\), expected str"),
    "null": (lambda m: m.update(dtype=None), ManifestError, r"\.dtype: got None"),
    "truth value for a float": (lambda m: m["contract"]["shape"].update(epsilon=True), ManifestError, r"\.epsilon: got True"),
    "NaN": (lambda m: m["contract"]["shape"].update(epsilon=float("nan")), ManifestError, r"\.epsilon: .*not finite"),
    "infinity": (lambda m: m["contract"]["shape"]["rope"]["inv_freq"].append(float("inf")), ManifestError, r"\.inv_freq\[\d+\]: .*finite"),
    "integer that no float holds": (lambda m: m["contract"]["shape"].update(epsilon=10**400), ManifestError, r"\.epsilon: .*not finite"),
    "object for a list": (lambda m: m["contract"]["plan"].update(sources={}), ManifestError, r"\.plan\.sources: got dict, expected a list"),
    "list for an object": (lambda m: m.update(files=[]), ManifestError, r"\.files: got list, expected an object"),
    "list for a dataclass": (lambda m: m.update(contract=[]), ManifestError, r"\.contract: got list, expected .* keys of Contract"),
    "pair of three": (
        lambda m: m["contract"]["plan"]["adapted"][2]["out_ranks"][0].append(1),
        ManifestError,
        r"adapted\[2\]\.out_ranks\[0\]: got 3 entries, expected 2",
    ),
    "record without hash": (lambda m: m["files"][CLOUD_GRAPH].pop("sha256"), ManifestError, r"\.files\.cloud\.pt\.sha256: missing key"),
    "other format": (lambda m: m.update(format="plora-edge"), ManifestError, r"\.format: got 'plora-edge', expected 'plora-cloud'"),
    "no format": (lambda m: m.pop("format"), ManifestError, r"\.format: got None"),
    "newer version": (lambda m: m.update(version=9, new_key=1), ManifestError, r"\.version: got 9, this plora reads [23]"),
    "older version": (lambda m: m.update(version=1), ManifestError, r"\.version: got 1, this plora reads 3; export again"),
    "edited rank": (lambda m: m["contract"]["plan"]["sources"][0].update(ranks=[["shared", 7]]), ManifestError, "the manifest was edited"),
    "edited hash": (lambda m: m.update(contract_hash="0" * 64), ManifestError, r"\.contract_hash: got 0000000000000000…"),
    "edited basis": (lambda m: m["contract"].update(basis="0" * 64), ManifestError, "the manifest was edited"),
    "illegal plan": (lambda m: m["contract"]["plan"]["sources"].pop(), PlanError, "layer 2 has source 2, which is not among"),
    "plan of another model": (lambda m: m["contract"]["shape"].update(layers=4), PlanError, "the plan is for 3 layers, the model has 4"),
    "A on the device that cannot be there": (
        lambda m: m["contract"]["plan"]["sources"][1].update(on_device=True), PlanError, "source 1 is on the device, but only .* layer 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_edited_manifest_is_refused_by_name(name: str, cloud_folder: Path) -> None:
    change, error, message = REFUSED[name]
    edit(cloud_folder, change)
    with pytest.raises(error, match=message):
        read_manifest(CloudManifest, cloud_folder)


@pytest.mark.parametrize(
    "name", ["../cloud.pt", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\x00b", "a\\b", "\ud800", "a" * 300, "a\n"]
)
def test_files_lie_in_the_folder(name: str, cloud_folder: Path) -> None:
    edit(cloud_folder, lambda m: m["files"].update({name: m["files"][CLOUD_GRAPH]}))
    with pytest.raises(ManifestError, match="not a plain file name"):
        read_manifest(CloudManifest, cloud_folder)


def test_a_half_is_not_the_other(made: Made) -> None:
    with pytest.raises(ManifestError, match=r"\.format: got 'plora-edge', expected 'plora-cloud'"):
        read_manifest(CloudManifest, made.out / "edge")
    with pytest.raises(ManifestError, match=r"\.format: got 'plora-cloud', expected 'plora-edge'"):
        read_manifest(EdgeManifest, made.out / "cloud")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"version": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "expected at most"),
    ],
    ids=["empty", "cut", "not-utf8", "deep", "long-number", "long"],
)
def test_a_manifest_that_is_no_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedFile, match=message):
        read_manifest(CloudManifest, tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "1", '"plora-cloud"'])
def test_a_manifest_that_is_no_object(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ManifestError, match="expected an object with the keys of CloudManifest"):
        read_manifest(CloudManifest, tmp_path)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"is .* the folder that you meant"):
        read_manifest(CloudManifest, tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_manifest(CloudManifest, tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_value_anywhere_makes_another_error(made: Made, data: st.DataObject) -> None:
    value = json.loads((made.out / "cloud" / MANIFEST).read_text())
    at: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(JSON_VALUES)
    with contextlib.suppress(ArtifactError, PlanError):  # any other error fails the test
        assert len(decode(CloudManifest, value, "manifest").contract.hash) == 64


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_byte, DamagedFile, "SHA-256 is"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), DamagedFile, r"got \d+ bytes, expected \d+"),
        (lambda path: path.write_bytes(b""), DamagedFile, "got 0 bytes"),
        (lambda path: path.unlink(), MissingFile, "not found, though the manifest lists it"),
    ],
    ids=["one-bit", "short", "empty", "missing"],
)
def test_every_listed_file_is_checked(
    damage: Callable[[Path], object], error: type[PloraError], message: str, edge_folder: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(EdgeManifest, edge_folder)
    assert len(manifest.files) > 5
    for name in manifest.files:
        kept = (edge_folder / name).read_bytes()
        damage(edge_folder / name)
        with pytest.raises(error, match=f"{name}: {message}"):
            check_files(edge_folder, manifest)
        check_files(edge_folder, manifest, frozenset(manifest.files) - {name})  # only what was asked for
        (edge_folder / name).write_bytes(kept)
    check_files(edge_folder, manifest)


def test_a_folder_in_a_files_place(edge_folder: Path) -> None:
    manifest = read_manifest(EdgeManifest, edge_folder)
    name = next(iter(manifest.files))
    (edge_folder / name).unlink()
    (edge_folder / name).mkdir()
    with pytest.raises(DamagedFile):
        check_files(edge_folder, manifest)


def test_a_file_that_is_not_listed_is_not_found(cloud_folder: Path) -> None:
    (cloud_folder / "more.bin").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"files: more\.bin is not listed"):
        require_file(read_manifest(CloudManifest, cloud_folder), cloud_folder, "more.bin")


def test_records_are_sorted(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert list(record_files(tmp_path, ["b", "a"]).items()) == [("a", FileRecord(3, digest)), ("b", FileRecord(3, digest))]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with new_folder(out) as temporary:
        (temporary / "file").write_text("whole")
        assert not out.exists()
        assert temporary.parent == out.parent  # on the same file system, so that the rename is one
    assert (out / "file").read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]


def fail_inside(block: AbstractContextManager[Path], name: str, error: type[BaseException]) -> None:
    """Writes half of something at `name` below what the block gives, and fails."""
    with block as temporary:
        (temporary / name).write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failed_folder_leaves_nothing(error: type[BaseException], replace: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if replace:
        out.mkdir()
        (out / "old").write_text("old")
    with pytest.raises(error):
        fail_inside(new_folder(out, replace), "file", error)
    assert list(tmp_path.iterdir()) == ([out] if replace else [])
    assert not replace or [path.name for path in out.iterdir()] == ["old"]


def test_a_folder_replaces_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UsageError, match="already exists; choose another --out or pass --replace"), new_folder(out):
        pytest.fail("the work began")
    with new_folder(out, replace=True) as temporary:
        (temporary / "new").write_text("new")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_somebody_else_made_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="already exists"), new_folder(out):
        (out / "theirs").mkdir(parents=True)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupted_replacement_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    replace = folders.os.replace
    calls: list[Any] = []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(folders.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert len(calls) == 3
    assert [path.name for path in out.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a writable folder"):
        check_new(tmp_path / "file" / "out")
    check_new(tmp_path / "deep" / "deeper" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_appears_whole_or_not_at_all(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "folder" / "file"
    with new_file(out) as temporary:
        temporary.write_text("first")
        assert not out.exists()
    assert out.read_text() == "first"
    with pytest.raises(error):
        fail_inside(new_file(out), "", error)
    assert out.read_text() == "first"
    with new_file(out) as temporary:
        temporary.write_text("second")
    assert out.read_text() == "second"
    assert list(out.parent.iterdir()) == [out]
