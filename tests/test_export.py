"""What is in an artifact and what is not; that verification notices damage; that an export appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import plora.export.cloud_build as cloud_build
import plora.export.export as exporter
import plora.export.halves as halves
from plora.artifact import entry_plan, paper_plan
from plora.artifact.edge_layout import graph_names
from plora.artifact.errors import DamagedFile, ManifestError, MissingFile, UsageError, VerificationError, WrongPair
from plora.artifact.hashes import record_files
from plora.artifact.manifest import MANIFEST, VERSIONS, CloudManifest, read_json, write_json
from plora.artifact.names import CHAT_TEMPLATE, CLOUD_GRAPH, CORES, ENTRY_DOWN, HEAD_TABLE, LAYERS, OPERATORS, TABLE, TOKENIZER, core_name
from plora.cloud_server.engine import Engine
from plora.device_runtime import open_session
from plora.device_runtime.edge import Edge
from plora.export.config import STAGES, ExportConfig
from plora.export.export import export
from plora.export.persona import export_cores
from plora.export.reference import REFERENCE
from plora.export.verify import verify
from plora.models.adapter import Adapter, read_adapter, write_adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base, read_base
from plora.models.formula import merge

from .conftest import TEXTS, Made, answer, command, greedy, make_export, oracle, save_tiny_base, tuned


@pytest.fixture(scope="module")
def again(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base and adapter exported once more, to a place of another name, over a folder that was there; written in this
    process like `made`, since the record's last bits depend on the number of threads."""
    out = tmp_path_factory.mktemp("again") / "of-another-name"
    (out / "cloud").mkdir(parents=True)
    (out / "cloud" / "stray").write_text("from before")
    export(ExportConfig(str(made.base), made.adapter_folder, out, replace=True), lambda stage: None, halves.write_halves)
    return out


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_export(tmp_path_factory.mktemp("tied"), "llama-tied")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of the shared export, to be damaged."""
    return Path(shutil.copytree(made.out, tmp_path / "copy"))


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite_record(half: Path, name: str) -> None:
    """The manifest says that the file is as it is now: what a hash cannot notice any more."""
    manifest = read_json(half / MANIFEST)
    record = record_files(half, [name])[name]
    manifest["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    write_json(half / MANIFEST, manifest)


# What is where


def private_bytes(base: Base, adapter: Adapter) -> dict[str, list[bytes]]:
    """What must not be in the cloud half, as it would lie in a file: rows and columns of each core, rows of both tables, the
    final norm, all in fp32, fp16 and bf16."""
    tables = {"table": base.model.model.embed_tokens.weight, "head": base.model.lm_head.weight}
    found: dict[str, list[bytes]] = {"cores": [], "table": [], "head": [], "norm": []}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for core in adapter.cores.values():
            found["cores"] += [line.to(dtype).view(torch.uint8).numpy().tobytes() for side in (core, core.T.contiguous()) for line in side]
        for name, table in tables.items():
            found[name] += [row[:8].to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for row in table.detach()]
        found["norm"].append(base.model.model.norm.weight.detach()[:8].to(dtype).view(torch.uint8).numpy().tobytes())
    words = ["ByteLevel", "<|start|>", "<|end|>", "messages", *(word for text in TEXTS for word in text.split() if len(word) > 5)]
    found["text"] = [word.encode() for word in words]
    return found


def occurring(folder: Path, needles: dict[str, list[bytes]]) -> set[str]:
    """Which kinds of needle are in any file below `folder`."""
    contents = [path.read_bytes() for path in files(folder).values()]
    return {kind for kind, wanted in needles.items() for content in contents if any(needle in content for needle in wanted)}


def test_cloud_half_holds_nothing_private(made: Made) -> None:
    needles = private_bytes(oracle(made), made.adapter)
    assert all(len(needle) >= 8 for kind in ("cores", "table", "head", "norm") for needle in needles[kind])
    assert occurring(made.out / "cloud", needles) == set()
    assert occurring(made.out / "edge", needles) == set(needles)  # the control: the search finds each kind where it is
    assert sorted(files(made.out / "cloud")) == [CLOUD_GRAPH, MANIFEST]


def test_edge_graphs_hold_neither_table_nor_cores(made: Made) -> None:
    needles = private_bytes(oracle(made), made.adapter)
    for kind in ("onnx", "ort"):
        for path in (made.out / "edge").glob(f"*.{kind}"):
            content = path.read_bytes()
            assert not any(needle in content for name in ("cores", "table", "head") for needle in needles[name]), path.name


def test_onnx_graphs_pass_the_checker_and_have_no_external_data(made: Made) -> None:
    graphs = sorted((made.out / "edge").glob("*.onnx"))
    assert len(graphs) == 3
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert not any(weight.external_data for weight in model.graph.initializer)
        assert {node.domain for node in model.graph.node} == {""}
    operators = (made.out / "edge" / OPERATORS).read_text()
    assert "Gather" in operators
    assert "Gemm" in operators


def test_files_of_the_edge_half_follow_from_the_plan(made: Made, layered: Made) -> None:
    """No graph that the plan does not need; and a runtime for phones is built with what the graphs say that they need."""
    for each, graphs, others in (
        (made, {"embedding", "head", "cores"}, set()),
        (layered, {"embedding", "head", "entry", "layer"}, {ENTRY_DOWN, LAYERS}),
    ):
        plan, edge = each.adapter.config.plan, each.out / "edge"
        assert set(graph_names(plan, oracle(each).shape)) == graphs
        for kind in ("onnx", "ort"):
            assert {path.stem for path in edge.glob(f"*.{kind}")} == graphs
        assert {ENTRY_DOWN, LAYERS} & set(files(edge)) == others
        assert set(read_json(edge / MANIFEST)["files"]) == set(files(edge)) - {MANIFEST}
        for graph in graphs:
            model = onnx.load(edge / f"{graph}.onnx")
            onnx.checker.check_model(model, full_check=True)
            domains = {node.domain for node in model.graph.node}
            assert domains == {opset.domain for opset in model.opset_import} == ({"", "com.microsoft"} if graph == "layer" else {""})
        assert ("GroupQueryAttention" in (edge / OPERATORS).read_text()) == ("layer" in graphs)


def test_device_layers_are_on_the_device_alone(layered: Made) -> None:
    """Rows of the weights of each layer: of the device's in the edge half, of the others in the cloud half."""
    layers = oracle(layered).model.model.layers
    for index, layer in enumerate(layers):
        weights = (layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        needles = {"rows": [row[:16].numpy().tobytes() for weight in weights for row in weight[:2].detach()]}
        on_device = index in layered.adapter.config.plan.device_layers
        assert bool(occurring(layered.out / "edge", needles)) == on_device
        assert bool(occurring(layered.out / "cloud", needles)) == (not on_device)
    assert occurring(layered.out / "cloud", private_bytes(oracle(layered), layered.adapter)) == set()


def test_same_input_same_bytes(made: Made, again: Path) -> None:
    """Wherever and whenever: and what was in the replaced folder is gone. All but the `.ort` files, whose tables onnxruntime's
    converter writes in the order of a hash map that it seeds afresh in every process, and their hashes in the manifest."""
    first, second = files(made.out), files(again)
    assert list(first) == list(second)
    manifest = f"edge/{MANIFEST}"
    same = [name for name in first if not name.endswith(".ort") and name != manifest]
    assert len(same) == len(first) - 4
    assert [name for name in same if first[name].read_bytes() != second[name].read_bytes()] == []
    a, b = read_json(first[manifest]), read_json(second[manifest])
    for value in (a, b):
        for name in ("cores.ort", "embedding.ort", "head.ort"):
            del value["files"][name]
    assert a == b


def test_no_file_names_a_folder_of_the_machine_that_exported(made: Made, tmp_path: Path) -> None:
    folders = [str(made.base), str(made.out.parent), str(Path(exporter.__file__).parents[1]), torch.__path__[0], tempfile.gettempdir()]

    def naming(below: Path) -> list[str]:
        return [name for name, path in files(below).items() if any(folder.encode() in path.read_bytes() for folder in folders)]

    assert naming(made.out) == []
    (tmp_path / "control").write_text(f"made in {made.base}")
    assert naming(tmp_path) == ["control"]


def test_ort_equals_onnx_over_the_wire(made: Made, served: str, merged: Base) -> None:
    for graphs in ("ort", "onnx"):
        with open_session(made.out / "edge", served, graphs=graphs) as session:
            ids = session.text.encode_raw("pack my box with")
            assert answer(session, ids, 32) == greedy(merged, ids, 32)


def test_tied_model_has_one_table_that_both_graphs_read(tied: Made, made: Made) -> None:
    assert (tied.out / "edge" / TABLE).is_file()
    assert not (tied.out / "edge" / HEAD_TABLE).exists()
    assert (made.out / "edge" / HEAD_TABLE).is_file()
    edge, model = Edge(tied.out / "edge"), oracle(tied).model
    table = model.model.embed_tokens.weight.detach()
    assert edge.head_table is edge.table
    assert np.array_equal(edge.embed([0, 7, 299]), table[[0, 7, 299]].numpy())
    exit_rows = torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(0))
    expected = model.lm_head(model.model.norm(exit_rows)).detach().numpy()
    np.testing.assert_allclose(edge.logits(exit_rows.numpy()), expected, atol=1e-5 * np.abs(expected).max())
    untied = Edge(made.out / "edge")
    assert not np.array_equal(untied.table, untied.head_table)


# Damage


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_any_file_is_noticed(copy: Path) -> None:
    verify(copy)  # the control: undamaged, it passes
    names = [f"{half}/{name}" for half in ("cloud", "edge") for name in read_json(copy / half / MANIFEST)["files"]]
    assert len(names) == len(files(copy / "cloud")) + len(files(copy / "edge")) - 2  # all but the manifests are listed
    for name in names:
        for at in (0, (copy / name).stat().st_size // 2, -1):
            flip(copy / name, at)
            with pytest.raises(DamagedFile, match=f"{Path(name).name}: SHA-256"):
                verify(copy)
            flip(copy / name, at)
    verify(copy)


@pytest.mark.parametrize("half", ["cloud", "edge"])
def test_a_shorter_longer_or_missing_file_is_noticed(half: str, copy: Path) -> None:
    path = copy / half / (CLOUD_GRAPH if half == "cloud" else TABLE)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(wrong)
        with pytest.raises(DamagedFile, match=f"got {len(wrong)} bytes, expected {len(whole)}"):
            verify(copy)
    path.unlink()
    with pytest.raises(MissingFile, match=path.name):
        verify(copy)


def test_an_edited_manifest_is_noticed(copy: Path) -> None:
    path = copy / "edge" / MANIFEST
    manifest = read_json(path)
    for damage in (
        {"contract": {**manifest["contract"], "basis": "0" * 64}},
        {"contract": {**manifest["contract"], "shape": {**manifest["contract"]["shape"], "epsilon": 1e-3}}},
        {"contract_hash": "0" * 64},
        {"dtype": "fp12"},
        {"tied": 1},
        {"version": VERSIONS[CloudManifest] + 1},
        {"surprise": None},
    ):
        write_json(path, {**manifest, **damage})
        with pytest.raises(ManifestError, match=next(iter(damage))):
            verify(copy)


def test_halves_of_two_exports_are_refused(copy: Path, tied: Made) -> None:
    shutil.rmtree(copy / "edge")
    shutil.copytree(tied.out / "edge", copy / "edge")
    with pytest.raises(WrongPair, match="not of one export"):
        verify(copy)


def edit_core(half: Path) -> None:
    with safe_open(half / CORES, framework="np") as file:
        metadata, cores = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cores[core_name(1, "v")] = cores[core_name(1, "v")] + np.float32(0.02)
    save_file(cores, half / CORES, metadata)


def edit_floats(name: str) -> Callable[[Path], None]:
    def edit(half: Path) -> None:
        values = np.fromfile(half / name, "<f4")
        values += np.float32(0.02)
        values.tofile(half / name)

    return edit


def edit_weight(half: Path) -> None:
    """Another value in the largest tensor of the TorchScript archive."""
    with zipfile.ZipFile(half / CLOUD_GRAPH) as old:
        content = {record.filename: old.read(record) for record in old.infolist()}
    largest = max((name for name in content if "/constants/" in name or "/data/" in name), key=lambda name: len(content[name]))
    values = np.frombuffer(content[largest], "<f4").copy()
    values[: len(values) // 8] += np.float32(0.1)
    content[largest] = values.tobytes()
    with zipfile.ZipFile(half / CLOUD_GRAPH, "w", zipfile.ZIP_STORED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def edit_tokenizer(half: Path) -> None:
    """Not the cause of any tensor: the control of these cases, which verification cannot and need not notice."""
    text = (half / TOKENIZER).read_text()
    (half / TOKENIZER).write_text(text + "\n")


@pytest.mark.parametrize(
    ("half", "name", "edit", "tensor"),
    [
        ("edge", CORES, edit_core, "injection.1 differs"),
        ("edge", TABLE, edit_floats(TABLE), "embedded differs"),
        ("edge", HEAD_TABLE, edit_floats(HEAD_TABLE), "logits differs"),
        ("cloud", CLOUD_GRAPH, edit_weight, r"(compressed|injection)\.\d differs|exit differs"),
        ("edge", TOKENIZER, edit_tokenizer, None),
    ],
    ids=["core", "table", "head", "weight", "control"],
)
def test_what_hashes_cannot_notice_the_tensors_do(
    half: str, name: str, edit: Callable[[Path], None], tensor: str | None, copy: Path
) -> None:
    """Wrong content with a right hash: verification says which tensor went wrong first."""
    edit(copy / half)
    rewrite_record(copy / half, name)
    if tensor is None:
        verify(copy)
    else:
        with pytest.raises(VerificationError, match=tensor):
            verify(copy)


@pytest.mark.parametrize(
    ("name", "tensor"), [(LAYERS, "entry differs"), (ENTRY_DOWN, r"injection\.-1 differs"), (CORES, r"injection\.-1 differs")]
)
def test_damage_to_the_devices_own_part_is_noticed(name: str, tensor: str, layered: Made, tmp_path: Path) -> None:
    """As above, for what only a plan with device layers or an entry source has."""
    edge = Path(shutil.copytree(layered.out, tmp_path / "copy")) / "edge"
    if name == CORES:
        with safe_open(edge / CORES, framework="np") as file:
            metadata, cores = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({core: values + np.float32(0.02) for core, values in cores.items()}, edge / CORES, metadata)
    else:
        edit_floats(name)(edge)
    rewrite_record(edge, name)
    with pytest.raises(VerificationError, match=tensor):
        verify(tmp_path / "copy")


def test_a_wrong_ort_graph_is_noticed(copy: Path) -> None:
    """The device may run either form: both are compared. Here the weight of the final norm differs in one of them."""
    graph = onnx.load(copy / "edge" / "head.onnx").graph
    norm = onnx.numpy_helper.to_array(next(weight for weight in graph.initializer if weight.name == "norm"))
    path = copy / "edge" / "head.ort"
    content = path.read_bytes()
    assert content.count(norm.tobytes()) == 1
    path.write_bytes(content.replace(norm.tobytes(), (norm * np.float32(1.01)).tobytes()))
    rewrite_record(copy / "edge", path.name)
    with pytest.raises(VerificationError, match=r"\.ort graphs differ"):
        verify(copy)


def test_the_record_is_needed_and_compared(copy: Path) -> None:
    path = copy / "verification" / REFERENCE
    with safe_open(path, framework="np") as file:
        record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record["logits"] = record["logits"] + np.float32(1.0)
    save_file(record, path)
    with pytest.raises(VerificationError, match="logits differs"):
        verify(copy)
    path.write_bytes(b"not safetensors")
    with pytest.raises(DamagedFile, match=REFERENCE):
        verify(copy)
    path.unlink()
    with pytest.raises(MissingFile, match=REFERENCE):
        verify(copy)


def test_report_says_what_was_compared(made: Made) -> None:
    report = json.loads((made.out / "verification" / "report.json").read_text())
    exchanged = {f"{kind}.{i}" for kind in ("compressed", "injection") for i in range(3)}
    assert set(report["errors"]) == {"embedded", "entry", *exchanged, "exit", "residual", "logits"}
    assert report["tolerance"] == 1e-4
    assert max(report["errors"].values()) < 1e-5
    assert report["greedy_equal"] == report["greedy_tokens"] == 24
    assert 0 < report["other_cores_error"] < 1e-5
    assert report["other_cores_moved"] > 100 * report["tolerance"]


def test_an_untuned_adapter_is_verified_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cores of zero a forgotten up-projection changes nothing, but with the other cores it does."""
    base_folder = save_tiny_base(tmp_path / "base", "llama")
    base = read_base(str(base_folder))
    write_adapter(new_adapter(base, entry_plan(3, 1, 6, shared_injection=10), "random", 1.0, 0), tmp_path / "adapter")
    config = ExportConfig(str(base_folder), tmp_path / "adapter", tmp_path / "out")
    report = export(config, lambda stage: None, halves.write_halves)
    assert report["other_cores_error"] < 1e-5 < 1e-2 < report["other_cores_moved"]

    real = cloud_build.up_projections

    def forgetful(*arguments: Any) -> Any:
        ups = real(*arguments)
        ups["o"] = []
        return ups

    monkeypatch.setattr(cloud_build, "up_projections", forgetful)
    with pytest.raises(VerificationError, match="with other cores the exit differs from the unsplit model"):
        export(dataclasses.replace(config, out=tmp_path / "wrong"), lambda stage: None, halves.write_halves)
    assert not (tmp_path / "wrong").exists()


# Whole or not at all


def test_a_failed_verification_leaves_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter writes other cores than it recorded; the verifying process, which reads files alone, must say so."""
    real = halves.write_edge
    monkeypatch.setattr(
        halves, "write_edge", lambda folder, base, tokenizer, adapter, dtype: real(folder, base, tokenizer, tuned(adapter, 9), dtype)
    )
    with pytest.raises(VerificationError, match=r"nothing was published: injection\.0 differs from the unsplit model"):
        export(ExportConfig(str(made.base), made.adapter_folder, tmp_path / "deep" / "out"), lambda stage: None, halves.write_halves)
    assert files(tmp_path) == {}
    assert not (tmp_path / "deep" / "out").exists()


def test_a_failed_replacement_leaves_the_old_export(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path) -> dict[str, object]:
        raise VerificationError("made to fail")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("still here")
    monkeypatch.setattr(exporter, "verify_in_process", fail)
    with pytest.raises(VerificationError, match="made to fail"):
        export(ExportConfig(str(made.base), made.adapter_folder, tmp_path / "out", replace=True), lambda stage: None)
    assert list(files(tmp_path)) == ["out/old"]


def test_an_existing_out_is_refused_before_any_work(made: Made, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match=r"already exists; choose another --out or pass --replace"):
        export(ExportConfig(str(made.base), made.adapter_folder, tmp_path), told.append)
    assert told == []
    assert list(tmp_path.iterdir()) == []
    assert len(STAGES) == 6


def test_bad_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype int8"):
        ExportConfig("base", tmp_path, tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="--edge-dtype bf16"):
        ExportConfig("base", tmp_path, tmp_path / "out", edge_dtype="bf16")


def test_an_adapter_for_another_base_is_refused(tied: Made, made: Made, tmp_path: Path) -> None:
    with pytest.raises(WrongPair, match="pass the base that it was tuned on"):
        export(ExportConfig(str(tied.base), made.adapter_folder, tmp_path / "out"), lambda stage: None)
    assert files(tmp_path) == {}


def test_a_damaged_torchscript_is_named(copy: Path) -> None:
    (copy / "cloud" / CLOUD_GRAPH).write_bytes(b"not an archive")
    rewrite_record(copy / "cloud", CLOUD_GRAPH)
    with pytest.raises(DamagedFile, match="not a TorchScript file"):
        Engine(copy / "cloud", 16 << 20)


# Personas


def test_cores_only_is_another_persona_of_the_same_export(made: Made, served: str, tmp_path: Path) -> None:
    other = tuned(read_adapter(made.adapter_folder), seed=77)
    write_adapter(other, tmp_path / "adapter")
    path = export_cores(tmp_path / "adapter", tmp_path / "persona", made.out, False)
    assert list(files(tmp_path / "persona")) == [CORES]
    base = oracle(made)
    merge(base.model, other)
    with open_session(made.out / "edge", served, cores=path) as session, open_session(made.out / "edge", served) as first:
        ids = session.text.encode_raw("hello world, how")
        expected = greedy(base, ids, 32)
        assert answer(session, ids, 32) == expected
        assert answer(first, ids, 32) != expected  # the control: the persona of the export says something else
    with pytest.raises(UsageError, match="already exists"):
        export_cores(tmp_path / "adapter", tmp_path / "persona", made.out, False)
    assert export_cores(tmp_path / "adapter", tmp_path / "persona", made.out, True) == path


def test_cores_only_of_another_basis_is_refused(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    write_adapter(tuned(new_adapter(base, made.adapter.config.plan, "random", 1.0, seed=1)), tmp_path / "adapter")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "persona"), "--cores-only", "--exported", str(made.out)]
    result = subprocess.run([command("plora-export"), str(made.base), *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == WrongPair.exit_code
    assert result.stderr.startswith("error: ")
    assert "tune with --basis on the adapter that was exported" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "persona").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (paper_plan(3, 5), "layer 0 is .*5.* here, .*6.* there"),
        (paper_plan(3, 6, ("q", "v")), "layer 0 is .* here, .*'k'.* there"),
        (entry_plan(3, 1, 6), "front_layers 1 here, 0 there"),
    ],
)
def test_cores_of_another_plan_name_where_the_plans_part(plan: Any, message: str, made: Made, tmp_path: Path) -> None:
    write_adapter(new_adapter(oracle(made), plan, "random", 1.0, 0), tmp_path / "adapter")
    with pytest.raises(WrongPair, match=f"tuned under another plan than .*{message}"):
        export_cores(tmp_path / "adapter", tmp_path / "persona", made.out, False)


def test_verify_command_reports_and_refuses(copy: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([command("plora-export"), "verify", str(copy), "--json"], capture_output=True, text=True, timeout=120)

    good = run()
    assert good.returncode == 0 and json.loads(good.stdout)["greedy_equal"] == 24, good.stderr
    flip(copy / "edge" / CHAT_TEMPLATE, 5)
    bad = run()
    assert bad.returncode == DamagedFile.exit_code
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: ")
    assert CHAT_TEMPLATE in bad.stderr
    assert "Traceback" not in bad.stderr
