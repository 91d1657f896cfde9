"""compose.yaml and the Dockerfile, checked without a container engine."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from deploy.cli import SUBCOMMANDS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)


def test_compose_fits_the_compose_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(ROOT / "compose.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml_is_clean() -> None:
    rules = "{extends: default, rules: {line-length: {max: 110}, document-start: disable}}"
    files = [ROOT / "compose.yaml", ROOT / "deploy" / "compose", ROOT / "monitoring"]
    done = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", rules, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_variable_is_in_the_example_with_its_default() -> None:
    used = dict(re.findall(r"\$\{(LECTERN_[A-Z_]+):-([^}]*)\}", TEXT))
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert used == example


def test_services_run_subcommands_that_exist() -> None:
    for name, service in COMPOSE["services"].items():
        if str(service["image"]).startswith("lectern"):
            assert service["command"][0] in SUBCOMMANDS, name
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]


def test_ports_are_published_on_loopback_only() -> None:
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_mounted_files_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source


def test_the_image_runs_as_a_user_of_its_own_and_copies_what_exists() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert "USER lectern" in lines
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source == "README.md" or (ROOT / source).exists(), source
                assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
