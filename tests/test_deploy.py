"""The container's files hold together, as far as that can be told without an engine; `python deploy/image.py all` does the rest."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import base, engines, image, sbom, slim, smoke
from plora.cloud_server.cli import config_of, main
from plora.cloud_server.config import ServerConfig

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
VARIABLE = re.compile(r"\bPLORA_CLOUD_[A-Z_]+\b")
SERVE = main.commands["serve"]


def instructions() -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction of the Dockerfile, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def said(keyword: str) -> list[str]:
    return [rest for word, rest in instructions() if word == keyword]


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def served_with(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], ServerConfig]:
    """What `plora-cloud serve` makes of these variables and no others: its values, and its config."""
    for name in [name for name in os.environ if name.startswith("PLORA_CLOUD_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = SERVE.make_context("serve", []).params
    return values, config_of({key: value for key, value in values.items() if key not in ("as_json", "verbose", "log_format", "log_level")})


def test_dockerfile_starts_with_the_base_and_ends_as_a_user_with_no_rights() -> None:
    found = instructions()
    assert found[0] == ("ARG", f"BASE={image.DEFAULT_BASE}")
    assert [rest.split()[0] for rest in said("FROM")] == ["${BASE}"] * 2
    assert said("USER") == [f"{smoke.UID}:{smoke.UID}"]
    words = [word for word, _ in found]
    assert max(words.index("USER"), 0) > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert not {"ADD", "VOLUME"} & set(words)
    assert said("STOPSIGNAL") == ["SIGTERM"]


def test_nothing_runs_through_a_shell_and_the_build_needs_no_network() -> None:
    (check,) = said("HEALTHCHECK")
    commands = [json.loads(rest) for rest in (*said("ENTRYPOINT"), *said("CMD"), check.partition("CMD ")[2])]
    assert commands == [[smoke.CLOUD], ["serve"], [smoke.CLOUD, "health"]]
    assert set(commands[1]) | {commands[2][1]} <= set(main.commands)
    assert not re.search(r"apt|curl|wget|https?://", " ".join(said("RUN")))
    assert "--no-index" in " ".join(said("RUN"))


def test_every_variable_that_is_named_is_a_setting_of_the_server() -> None:
    known = {parameter.envvar for parameter in SERVE.params if isinstance(parameter.envvar, str)}
    for path in (DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", DEPLOY / "engines.py", DEPLOY / "smoke.py"):
        assert set(VARIABLE.findall(path.read_text())) <= known, path.name


def test_the_images_own_settings_want_tls_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(re.findall(r"(PLORA_CLOUD_[A-Z_]+)=(\S+)", " ".join(said("ENV"))))
    with pytest.raises(Exception, match="--tls-cert|--tokens|TLS|token"):
        served_with(variables, monkeypatch)
    more = {"PLORA_CLOUD_TLS_CERT": "/c", "PLORA_CLOUD_TLS_KEY": "/k", "PLORA_CLOUD_TOKENS": "/t"}
    _, config = served_with({**variables, **more}, monkeypatch)
    assert config.folder == Path("/artifact")
    exposed = {int(port) for rest in said("EXPOSE") for port in rest.split()}
    assert exposed == {int(variables[f"PLORA_CLOUD_{name}"].rpartition(":")[2]) for name in ("LISTEN", "OPS")}
    assert engines.PORT in exposed


def test_compose_mounts_only_read_only_and_gives_no_right(monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose()["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service), name
        for mount in service["volumes"]:
            if isinstance(mount, str):  # a named volume, of those who keep what they gather
                assert name != "plora-cloud" and mount.partition(":")[0] in compose()["volumes"]
            else:
                assert mount["type"] == "bind" and mount["read_only"] is True, mount
    cloud = services["plora-cloud"]
    assert cloud["user"] == said("USER")[0]
    assert cloud["healthcheck"]["test"] == ["CMD", smoke.CLOUD, "health"]
    image_variables = dict(re.findall(r"(PLORA_CLOUD_[A-Z_]+)=(\S+)", " ".join(said("ENV"))))
    values, config = served_with({**image_variables, **cloud["environment"]}, monkeypatch)
    targets = {mount["target"] for mount in cloud["volumes"]}
    assert str(config.folder) in targets
    assert {str(values[key].parent) for key in ("tls_cert", "tls_key", "tokens")} < targets
    assert int(cloud["stop_grace_period"].removesuffix("s")) > values["drain_seconds"] + values["grace_seconds"]


def test_only_prometheus_shares_a_network_with_the_ops_port() -> None:
    found = compose()
    published = found["services"]["plora-cloud"]["ports"]
    assert [port.rpartition(":")[2] for port in published] == [str(engines.PORT)]
    for network in found["services"]["plora-cloud"]["networks"]:
        others = {name for name, service in found["services"].items() if network in service["networks"]} - {"plora-cloud"}
        assert others <= {"prometheus"}, network
    assert found["networks"]["ops"] == {"internal": True}
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["plora-cloud:" + found["services"]["plora-cloud"]["environment"]["PLORA_CLOUD_OPS"].rpartition(":")[2]]


def test_what_compose_mounts_from_this_folder_is_here_and_fits() -> None:
    mounts = {
        mount["source"]: mount["target"]
        for service in compose()["services"].values()
        for mount in service["volumes"]
        if isinstance(mount, dict)
    }
    made_by_the_operator = ("./artifact", "./secrets/")
    for source in mounts:
        if source == "./dashboard.json" and not (DEPLOY / source).exists():
            pytest.skip("deploy/dashboard.json is not written yet")
        assert source.startswith(made_by_the_operator) or (DEPLOY / source).is_file(), source
    (provider,) = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert str(Path(mounts["./dashboard.json"]).parent) == provider["options"]["path"]
    (source,) = yaml.safe_load((DEPLOY / "grafana" / "datasources.yaml").read_text())["datasources"]
    dashboard = json.loads((DEPLOY / "dashboard.json").read_text())
    variables = {f"${{{variable['name']}}}" for variable in dashboard["templating"]["list"] if variable["query"] == source["type"]}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} <= {source["uid"], *variables}


def test_slimming_takes_what_is_listed_and_leaves_what_torch_looks_for(tmp_path: Path) -> None:
    packages, commands = tmp_path / "site-packages", tmp_path / "bin"
    gone = ("torch/test/big.bin", "torch/include/a.h", "torch/bin/protoc", "numpy/core/tests/test_a.py", "setuptools/x.py", "numpy/a.pyi")
    kept = ("torch/bin/torch_shm_manager", "torch/testing/__init__.py", "numpy/core/a.py")
    for name in (*gone, *kept):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_bytes(b"12345")
    commands.mkdir()
    (commands / "torchrun").touch()
    (commands / "plora-cloud").touch()
    removed = slim.remove(packages, commands)
    assert sum(removed.values()) == 5 * len(gone)
    assert {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()} == set(kept)
    assert [path.name for path in commands.iterdir()] == ["plora-cloud"]


def test_stripping_the_base_keeps_the_licences(tmp_path: Path) -> None:
    for name in (
        "usr/share/doc/zlib1g/copyright",
        "usr/share/doc/zlib1g/changelog.gz",
        "usr/share/doc/notes/README",
        "var/cache/apt/archives/a.deb",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    base.strip(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["usr/share/doc/zlib1g/copyright"]
    assert base.tree_bytes(tmp_path) == 5


def test_bill_of_materials_names_debian_packages_and_a_python_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Debian GNU/Linux"\nVERSION_ID="12"\n')
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: zlib1g\nStatus: install ok installed\nMaintainer: A Person <a@example.org>\nArchitecture: amd64\nSource: zlib (1:1.2)\nVersion: 1:1.2+b1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n"
    )
    header = tmp_path / "usr/local/include/python3.11/patchlevel.h"
    header.parent.mkdir(parents=True)
    header.write_text('#define PY_VERSION      "3.11.13"\n')
    debian = sbom.debian_components(tmp_path)
    assert [part["purl"] for part in debian] == [
        "pkg:deb/debian/zlib1g@1%3A1.2%2Bb1?arch=amd64&distro=debian-12",
        "pkg:generic/python@3.11.13",
    ]
    assert debian[0]["supplier"] == {"name": "A Person"} and debian[0]["properties"][0]["value"] == "zlib"
    python = {"components": [{"bom-ref": "click==8", "name": "click", "licenses": [{"license": {"id": "BSD-3-Clause"}}]}]}
    bill = sbom.merged(python, debian, "localhost:5000/plora-cloud:1.2")
    assert bill["metadata"]["component"]["name"] == "plora-cloud" and bill["metadata"]["component"]["version"] == "1.2"
    assert len(bill["components"]) == 3 and len(bill["dependencies"][0]["dependsOn"]) == 3
    assert sbom.licences([*python["components"], {"name": "mute"}]) == {"BSD-3-Clause": ["click"], "not said": ["mute"]}


def test_what_a_runtime_is_told_is_as_tight_as_the_image(tmp_path: Path) -> None:
    spec = {
        "process": {"capabilities": {"effective": ["CAP_KILL"]}, "rlimits": []},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}], "resources": {}},
        "mounts": [{"destination": "/proc"}, {"destination": "/sys/fs/cgroup"}],
    }
    own = {"User": "10001:10001", "Env": ["A=1", "B=2"], "Entrypoint": ["/x"], "Cmd": ["serve"]}
    made = engines.runtime_config(spec, own, tmp_path, {"/artifact": tmp_path}, {"B": "3"})
    assert made["process"]["user"] == {"uid": 10001, "gid": 10001} and made["process"]["args"] == ["/x", "serve"]
    assert made["process"]["env"] == ["A=1", "B=3"]
    assert made["process"]["capabilities"] == {} and made["process"]["noNewPrivileges"] is True
    assert made["root"]["readonly"] is True
    assert made["mounts"][-1]["destination"] == "/artifact" and "ro" in made["mounts"][-1]["options"]


def test_without_an_engine_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(image, "OUT", tmp_path / "out")
    assert image.main(["build"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no engine works here: docker: ") and "buildah" in line and "install" in line
