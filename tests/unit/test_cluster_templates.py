"""The templates of launch/templates, and what docs/sharding.md tells people to type."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from alpro_sharding.config import ShardConfig
from alpro_stream.config import load_config, validate

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "launch/templates"
DOCUMENT = (ROOT / "docs/sharding.md").read_text()
RAY_VERSION = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]

# Fields of the resource ray.io/v1 RayJob (KubeRay 1.5.1) that a template may use; Kubernetes refuses unknown ones.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "entrypoint", "metadata", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend"),
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion"),
    *("suspend", "workerGroupSpecs"),
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_FIELDS = {
    *(
        "groupName",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "rayStartParams",
        "replicas",
        "scaleStrategy",
        "template",
    ),
}


@pytest.fixture(scope="module")
def job():
    (document,) = yaml.safe_load_all((TEMPLATES / "kuberay-shard.yaml").read_text())
    return document


def test_the_kubernetes_job_has_the_fields_of_the_resource(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= JOB_FIELDS
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_every_pod_has_the_shared_folder_and_the_credentials(job):
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["envFrom"] == [{"secretRef": {"name": "alpro-s3", "optional": True}}]
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert pod["securityContext"]["runAsNonRoot"]


def test_the_command_of_the_kubernetes_job_is_a_valid_configuration(job):
    python, flag, module, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "sharding")
    options = load_config(ShardConfig, ROOT / config, overrides)
    assert Path(options.out).is_absolute()
    assert Path(options.manifest).is_absolute()
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"].startswith("file:///shared/")


def test_all_templates_name_the_tested_version_of_ray(job):
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert cluster["rayVersion"] == RAY_VERSION
    assert images == {f"REGISTRY/alpro-sharding:{RAY_VERSION}"}
    assert f"ARG RAY_VERSION={RAY_VERSION}\n" in (TEMPLATES / "Dockerfile").read_text()
    assert set(re.findall(r"alpro-sharding:([\d.]+)", DOCUMENT)) == {RAY_VERSION}


@pytest.fixture
def start(tmp_path):
    """Runs the script with a `ray` that notes how it is called, in an environment that is complete already."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/ray").write_text('#!/bin/bash\necho "$RAY_AUTH_MODE $@" >> "$(dirname "$0")/calls"\n')
    (venv / "bin/ray").chmod(0o755)
    (venv / "installed-requirements.txt").write_bytes((TEMPLATES / "requirements-sharding.txt").read_bytes())

    def run(*arguments, **variables):
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "ALPRO_VENV": str(venv), **variables}
        command = [TEMPLATES / "ray-cluster.sh", *arguments]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        calls = venv / "bin/calls"
        return result, calls.read_text().splitlines() if calls.exists() else []

    return run


START = "token start --block --object-store-memory=200000000"


def test_the_script_starts_a_head_with_a_token(start):
    result, calls = start("head", "--num-cpus=8")
    assert result.returncode == 0, result.stderr
    assert calls == [" get-auth-token --generate", f"{START} --head --num-cpus=8"]
    assert "~/.ray/auth_token" in result.stderr


def test_the_script_takes_a_token_that_is_given(start):
    _, calls = start("head", RAY_AUTH_TOKEN="a" * 32)
    assert calls == [f"{START} --head"]


def test_the_script_joins_a_cluster(start):
    result, calls = start("join", "10.0.0.1:6379", "--num-cpus=2")
    assert result.returncode == 0, result.stderr
    assert calls == [f"{START} --address=10.0.0.1:6379 --num-cpus=2"]


@pytest.mark.parametrize("arguments", [(), ("join",), ("stop",)])
def test_the_script_says_how_it_is_used(start, arguments):
    result, calls = start(*arguments)
    assert result.returncode == 2
    assert "ray-cluster.sh join HEAD:6379" in result.stderr
    assert calls == []


MAKES_AN_ENVIRONMENT_WITHOUT_NETWORK = r"""#!/bin/bash
echo "$@" >> "$HOME/venvs"
printf '#!/bin/bash\nexit 1\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def test_the_script_installs_what_is_missing_and_again_when_interrupted(start, tmp_path):
    (tmp_path / "venv/installed-requirements.txt").unlink()
    python = tmp_path / "python"
    python.write_text(MAKES_AN_ENVIRONMENT_WITHOUT_NETWORK)
    python.chmod(0o755)
    for attempt in (1, 2):
        result, calls = start("head", PYTHON=str(python))
        assert result.returncode == 1
        assert calls == []
        assert len((tmp_path / "venvs").read_text().splitlines()) == attempt


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_in_the_document_are_valid(text):
    validate(ShardConfig, {"manifest": "m.jsonl", "out": "out", **yaml.safe_load(text)}, "docs/sharding.md")


def test_commands_in_the_document_are_valid():
    commands = re.findall(r"(?:alpro shard|-m sharding) (\S+\.yaml)((?:[ ]+\S+=\S+)*)", "\n".join(blocks("bash")))
    assert len(commands) >= 4
    for config, overrides in commands:
        load_config(ShardConfig, ROOT / config, [*overrides.split(), "contact=me"])


def test_options_named_in_the_document_exist():
    names = set(re.findall(r"`((?:frames|video|filters|fetch|limits|entities|reading)\.(?!json`)\w+)[`=]", DOCUMENT))
    assert len(names) > 8
    for name in names:
        part, field = name.split(".")
        assert field in ShardConfig.model_fields[part].annotation.model_fields, name
