"""What can be held of images and compose file without an engine that runs them."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from api.settings import Settings
from tests.setting_variables import setting_variables

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OWN = ("migrate", "api", "worker", "inference")
LASTING = [name for name, service in SERVICES.items() if service.get("restart") != "no"]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
LOADED_WITH_GPU = {"torch", "triton", "transformers", "safetensors", "kernels"}


def seconds(text):
    return int(text.removesuffix("s"))


def test_all_parts_of_the_service_are_composed():
    assert set(SERVICES) == {"postgres", "redis", *OWN}


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_runs_without_privileges(name):
    service = SERVICES[name]

    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_container_has_a_health_check_and_time_to_stop(name):
    service = SERVICES[name]

    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert seconds(service["stop_grace_period"]) > 0


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned_to_a_version(name):
    image, _, tag = SERVICES[name]["image"].partition(":")

    assert image
    assert re.match(r"\d+\.\d+", tag), f"{name}: {tag!r}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_base_image_is_pinned_to_a_patch_version(path):
    text = path.read_text()
    versions = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    bases = re.findall(r"^FROM \S+?:\$\{(\w+)\}", text, re.MULTILINE)

    assert len(bases) == len(re.findall(r"^FROM ", text, re.MULTILINE))
    assert all(re.match(r"\d+\.\d+\.\d+-", versions[base]) for base in bases)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_copied_source_exists(path):
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE)
    sources = [source for copy in copies for source in copy.split()]

    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_copied_source_is_sent_to_the_builder(path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE)
    tops = {source.split("/")[0] for copy in copies for source in copy.split()}

    assert ignored[0] == "*"
    assert {f"!{top}" for top in tops} <= set(ignored)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_ends_as_another_user_than_root(path):
    users = re.findall(r"^USER (\S+)$", path.read_text(), re.MULTILINE)

    assert int(users[-1].split(":")[0]) > 0


@pytest.mark.parametrize("name", OWN)
def test_every_variable_that_compose_sets_is_a_setting(name):
    known = setting_variables()
    given = {each for each in SERVICES[name]["environment"] if each.startswith("ABQ_")}

    assert given
    assert given <= known


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_variable_that_an_image_sets_is_a_setting(path):
    known = setting_variables()

    assert set(re.findall(r"\b(ABQ_\w+)=", path.read_text())) <= known


def test_the_example_of_secrets_names_every_variable_that_compose_requires():
    required = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    example = (ROOT / "docker/abq.env.example").read_text()

    assert required
    assert required <= set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_a_worker_may_finish_its_grace_period_before_it_is_killed():
    assert seconds(SERVICES["worker"]["stop_grace_period"]) > Settings().worker.grace_s + 10


def test_only_the_worker_writes_artifacts():
    writers = [
        name
        for name, service in SERVICES.items()
        for volume in service.get("volumes", ())
        if volume.startswith("artifacts:") and not volume.endswith(":ro")
    ]

    assert writers == ["worker"]


def test_gpus_are_reserved_for_those_who_load_models():
    reserved = {name for name, service in SERVICES.items() if "deploy" in service}

    assert reserved == {"worker", "inference"}


def test_the_inference_service_reaches_neither_database_nor_internet():
    networks = SERVICES["inference"]["networks"]

    assert networks == ["models"]
    assert COMPOSE["networks"]["models"] == {"internal": True}


def test_volumes_are_declared():
    used = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
    }

    assert used == set(COMPOSE["volumes"])


def closure(names):
    """All distributions that the installed metadata demand, without extras."""
    seen, waiting = set(), list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            waiting += requires(name) or ()
        except PackageNotFoundError:
            continue
    return seen


def test_the_api_image_installs_nothing_that_loads_models():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    installed = closure(project["dependencies"])

    assert {"fastapi", "starlette", "sqlalchemy", "kombu"} <= installed
    assert installed.isdisjoint(LOADED_WITH_GPU)


def test_the_api_image_holds_no_code_of_the_worker():
    text = (ROOT / "docker/api.Dockerfile").read_text()

    assert "COPY worker" not in text
    assert "COPY kernels" not in text
    assert "[engine]" not in text
