"""The manifests against KubeRay's fields, the image against what it copies, and both against the code they start."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.cli.commands import COMMANDS
from cluster.cli.main import parse
from cluster.config.load import read_overrides
from cluster.config.schema import Config

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster" / "deploy" / "kubernetes"
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


def test_there_are_clusters_of_gpus_and_of_cpus_and_a_job():
    assert [path.stem for path in MANIFESTS] == ["raycluster-cpu", "raycluster", "rayjob"]


def test_a_manifest_has_kuberays_fields_only(manifest):
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpecs"), {}),
        (("kind",), "RayService"),
        (("metadata", "generateName"), "Rayward_"),
        (("spec", "shutdownAfterJobFinishes"), False),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "autoscalerOptions"), {"idleTimeout": 1}),
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


def command_lines() -> Iterator[tuple[str, str]]:
    """Every `rayward ...` in a manifest, the batch script and the page about clusters, with the file's name."""
    for file in (*MANIFESTS, ROOT / "cluster/deploy/slurm/rayward.sbatch", ROOT / "docs/cluster.md"):
        text = file.read_text(encoding="utf-8").replace("sbatch --nodes 2 --gpus-per-node 8 cluster/deploy/slurm/", "")
        for line in re.findall(r"^(?:#? *|  entrypoint: )rayward(?:\.sbatch)? ([a-z].*)$", text, re.MULTILINE):
            yield file.name, re.split(r"  +", line)[0]


@pytest.mark.parametrize(("file", "line"), command_lines())
def test_every_command_line_parses_with_a_preset_that_exists(file, line):
    name, *words = shlex.split(line, comments=True)
    if name == "submit":
        name, *words = words
    if not COMMANDS[name].sections:
        return
    read_overrides(Config, parse(COMMANDS[name], words).overrides)  # a preset that is not there is refused


def test_the_jobs_entrypoint_names_shared_storage_and_goes_on_after_a_retry():
    words = shlex.split(yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]["entrypoint"])
    call = parse(COMMANDS[words[1]], words[2:])
    assert call.run_dir.is_absolute()
    assert "resume" in call.flags


def test_images_are_of_the_locks_that_there_are():
    found = {
        c["image"] for path in MANIFESTS for pod in pods(yaml.safe_load(path.read_text())) for c in containers(pod)
    }
    assert found == {f"REGISTRY/rayward:{kind}" for kind in ("cpu", "cuda")}


def containers(pod):
    return pod["template"]["spec"]["containers"]


def test_the_image_copies_what_exists_and_all_that_is_needed():
    text = (FOLDER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"reward_server/", "actors/", "learner/", "cluster/", "pyproject.toml"} <= set(copied)
    for kind in re.findall(r"LOCK=(\w+)", text):
        assert (ROOT / "requirements" / f"{kind}.lock").is_file()
