"""The files for clusters, checked without one: as Ray's launcher and KubeRay's autoscaler read them."""

import re
import subprocess
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_run

ROOT = Path(__file__).parents[2]
POOLS = {"agents": None, "single": 1, "sharded": 4}
"""Worker groups and their GPUs."""


def filled(file: str) -> dict[str, Any]:
    """A YAML file after `envsubst`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for name in re.findall(r"envsubst '([^']*)'", text)[0].replace("$", "").split():
        text = text.replace("${" + name + "}", f"value-of-{name}")
    assert "${" not in text, "a variable that envsubst is not told of"
    return yaml.safe_load(text)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_cluster_yaml_is_what_ray_up_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(filled("cluster.yaml"))
    validate_config(config)
    assert config["docker"]["image"] == "value-of-BERTH_IMAGE"
    assert not any(config[name] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"))
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert {name: kind["resources"].get("GPU") for name, kind in types.items()} == POOLS
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert all(kind["labels"] == {"pool": name} for name, kind in types.items())
    assert types["single"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert sum(kind["max_workers"] for kind in types.values()) == config["max_workers"]


def test_rayjob_is_what_kuberay_takes():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    job = filled("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    # ray-operator/apis/ray/v1/rayjob_types.go: fields that are misspelt would be dropped without a word.
    assert spec.keys() <= {
        "activeDeadlineSeconds",
        "backoffLimit",
        "entrypoint",
        "rayClusterSpec",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "ttlSecondsAfterFinished",
    }
    cluster = spec["rayClusterSpec"]
    known = {"autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion", "workerGroupSpecs"}
    assert cluster.keys() == known
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "berth", "namespace": "default"}, "spec": cluster}
    )
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0)) == (0, 0)
    assert {name: kind["resources"].get("GPU") for name, kind in types.items()} == POOLS
    assert all(kind["min_workers"] == 0 and kind["labels"] == {"pool": name} for name, kind in types.items())
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == "value-of-BERTH_IMAGE"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "env" not in container, "secrets come by name"


def test_rayjob_runs_a_command_that_berth_takes():
    words = filled("deploy/rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "pipeline", "run"]
    sets = [word for before, word in pairwise(words) if before == "--set"]
    config = load_run(words[4].replace("/berth", str(ROOT)), sets, out=words[words.index("--out") + 1])
    assert config.ray.address == "auto"
    assert config.pools["single"].labels == {"pool": "single"}
    assert config.pools["single"].num_gpus == 1
    assert {config.ray.labels["pool"], config.pools["single"].labels["pool"]} <= POOLS.keys()


def test_dockerfile_copies_what_there_is_and_installs_what_is_locked():
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    version = (ROOT / "uv.lock").read_text(encoding="utf-8").partition('name = "ray"\nversion = "')[2].split('"')[0]
    assert filled("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    lines = [line.split() for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    copied = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
    assert {"pipeline", "actors", "datasets", "uv.lock"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    syncs = [line for line in lines if "sync" in line]
    assert syncs
    assert all("--frozen" in line and "--no-dev" in line for line in syncs)
    # requires-python and the wheels' tag are those of the image's Python
    assert lines[0][1].startswith("python:3.11")


def test_what_ray_job_submit_takes_along(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv", "venv", "__pycache__"])
    taken = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    code = subprocess.run(
        ["git", "ls-files", "pipeline", "actors", "datasets", "configs"], cwd=ROOT, capture_output=True, text=True
    )
    assert set(code.stdout.split()) - taken == set()
    left = (".git", ".venv", ".cache", "runs", "docs", "bench", "deploy", "uv.lock", "__pycache__")
    assert not [name for name in taken if name.split("/")[0] in left or "__pycache__" in name]
    assert package.stat().st_size < 2**23
