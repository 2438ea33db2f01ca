"""The manifests against KubeRay's fields, the image against what it copies, and both against the code they start."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.cli import parse
from cluster.commands import COMMANDS
from cluster.config import Config
from cluster.settings import read_overrides

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.json").read_text())
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


def cluster_of(manifest):
    spec = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pods(manifest):
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request):
    return yaml.safe_load(request.param.read_text())


def test_there_is_a_cluster_and_a_job():
    assert [path.stem for path in MANIFESTS] == ["raycluster", "rayjob"]


def test_a_manifest_has_kuberays_fields_only(manifest):
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpecs"), {}),
        (("kind",), "RayService"),
        (("metadata", "generateName"), "Rayward_"),
    ],
)
def test_the_schema_refuses_what_kuberay_would(path, value):
    manifest = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_requests_are_limits_so_that_ray_counts_what_the_pod_has(manifest):
    for pod in pods(manifest):
        for container in pod["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_every_mounted_volume_exists(manifest):
    for pod in pods(manifest):
        spec = pod["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for c in spec["containers"] for mount in c["volumeMounts"]} == volumes


def test_the_cluster_asks_for_a_token_and_the_manifest_holds_no_secret(manifest):
    assert cluster_of(manifest)["authOptions"] == {"mode": "token"}
    for pod in pods(manifest):
        for container in pod["template"]["spec"]["containers"]:
            assert "env" not in container
            assert container["envFrom"] == [{"secretRef": {"name": "rayward-secrets", "optional": True}}]


def test_rays_version_is_the_locks(manifest):
    for kind in ("cpu", "cuda"):
        lock = (ROOT / "requirements" / f"{kind}.lock").read_text()
        found = re.search(r"^ray(?:\[default\])?==(\S+)", lock, re.MULTILINE)
        assert found, kind
        assert cluster_of(manifest)["rayVersion"] == found[1]


def test_the_jobs_entrypoint_is_a_command_line_that_parses():
    words = shlex.split(yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]["entrypoint"])
    assert words[0] == "rayward"
    call = parse(COMMANDS[words[1]], words[2:])
    read_overrides(Config, call.overrides)
    assert call.run_dir.is_absolute()


def test_the_image_copies_what_exists_and_all_that_is_needed():
    text = (FOLDER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"reward_server/", "actors/", "learner/", "cluster/", "pyproject.toml"} <= set(copied)
    for kind in re.findall(r"LOCK=(\w+)", text):
        assert (ROOT / "requirements" / f"{kind}.lock").is_file()
