"""The templates of launch/templates for training, and what docs/cluster.md tells people to type."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from alpro_launch.cli import _parse, find_config, split_arguments
from alpro_launch.hostfile import num_slots, read_hostfile
from alpro_launch.local_ranks import Node, rank_environments
from alpro_launch.restart import allowed_ranks
from alpro_launch.topology import find_topology
from alpro_stream.config import load_config
from alpro_stream.exit_status import BUG, CONFIGURATION, DATA, HARDWARE, PREEMPTED
from alpro_stream.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "launch/templates"
DOCUMENT = (ROOT / "docs/cluster.md").read_text()
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

# Fields of batch/v1 Job and its pods (Kubernetes 1.26) that the template may use; Kubernetes refuses unknown ones.
JOB_FIELDS = {"backoffLimit", "completionMode", "completions", "parallelism", "podFailurePolicy", "template"}
POD_FIELDS = {
    *("containers", "restartPolicy", "securityContext", "subdomain", "terminationGracePeriodSeconds", "volumes"),
}
CONTAINER_FIELDS = {"command", "env", "image", "name", "resources", "volumeMounts"}


@pytest.fixture(scope="module")
def service_and_job():
    return list(yaml.safe_load_all((TEMPLATES / "train-job.yaml").read_text()))


def test_the_hostfile_can_be_read_and_fits_the_published_run():
    hosts = read_hostfile(TEMPLATES / "hostfile")
    config = load_config(RunConfig, ROOT / "configs/pretrain/webvid_cc3m.yaml")
    allowed = allowed_ranks(config.stream.num_lanes, config.train.engine.num_micro_batches)
    assert num_slots(hosts) in allowed


def test_the_kubernetes_job_has_fields_that_exist_and_volumes_that_are_mounted(service_and_job):
    service, job = service_and_job
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == (
        "v1",
        "Service",
        "batch/v1",
        "Job",
    )
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert set(job["spec"]) <= JOB_FIELDS
    assert set(pod) <= POD_FIELDS
    assert set(container) <= CONTAINER_FIELDS
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["image"] == f"REGISTRY/alpro-stream:{VERSION}"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == pod["subdomain"]


def test_the_pods_of_the_job_find_each_other(service_and_job):
    service, job = service_and_job
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (variable,) = container["env"]
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert spec["completionMode"] == "Indexed"
    places = []
    for index in range(spec["completions"]):
        command = [word.replace(f"$({variable['name']})", str(index)) for word in container["command"]]
        arguments = _parse(command[1:])
        assert (command[0], arguments.nodes) == ("alpro", spec["completions"] == spec["parallelism"] and 2)
        node = Node(arguments.nodes, arguments.node_rank, arguments.master_addr, arguments.master_port)
        places += [find_topology(environment) for environment in rank_environments(arguments.ranks, node)]
    assert [place.rank for place in places] == list(range(16))
    assert {place.address for place in places} == {f"{job['metadata']['name']}-0.{service['metadata']['name']}"}
    assert {place.port for place in places} == {service["spec"]["ports"][0]["port"]}
    configs, overrides = split_arguments(arguments.arguments)
    config = load_config(RunConfig, ROOT / find_config(configs[0]), overrides)
    assert 16 in allowed_ranks(config.stream.num_lanes, config.train.engine.num_micro_batches)
    assert config.run_dir.is_relative_to("/shared")


def test_a_pod_that_would_fail_again_fails_the_job(service_and_job):
    final, evicted = service_and_job[1]["spec"]["podFailurePolicy"]["rules"]
    assert (final["action"], evicted["action"]) == ("FailJob", "Ignore")
    assert {*final["onExitCodes"]["values"]} == {2, DATA, BUG, CONFIGURATION}
    assert not {HARDWARE, PREEMPTED} & {*final["onExitCodes"]["values"]}
    assert (
        final["onExitCodes"]["containerName"] == service_and_job[1]["spec"]["template"]["spec"]["containers"][0]["name"]
    )


@pytest.fixture
def batch(tmp_path):
    """Runs the batch script with a `srun` and a `scontrol` that note how they are called."""
    for name, rest in (("srun", 'exit "$STATUS"'), ("scontrol", "")):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\n{rest}\n')
        (tmp_path / name).chmod(0o755)

    def run(status, restarts=None):
        (tmp_path / "calls").write_text("")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STATUS": str(status), "SLURM_JOB_ID": "7", "ALPRO_VENV": "/venv"}
        env |= {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
        command = ["bash", TEMPLATES / "train.sbatch", "run.yaml", "stream.seed=3", "a=[b c]"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == status, done.stderr
        started, *queued = (tmp_path / "calls").read_text().splitlines()
        assert started == "srun /venv/bin/python -m alpro_launch.train run.yaml stream.seed=3 a=[b c]"
        return queued

    return run


@pytest.mark.parametrize(
    ("status", "restarts", "is_queued"),
    [
        (0, None, False),
        (PREEMPTED, None, True),
        (PREEMPTED, 50, True),
        (HARDWARE, 4, True),
        (HARDWARE, 5, False),
        (137, 0, True),
        (137, 5, False),
        (CONFIGURATION, 0, False),
        (BUG, 0, False),
        (DATA, 0, False),
    ],
)
def test_the_batch_script_is_queued_again_where_that_may_help(batch, status, restarts, is_queued):
    assert batch(status, restarts) == (["scontrol requeue 7"] if is_queued else [])


def test_the_batch_script_asks_for_one_task_a_gpu_and_for_a_signal():
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (TEMPLATES / "train.sbatch").read_text(), re.MULTILINE)
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")
    assert "requeue" in options


def test_the_image_installs_what_is_in_the_checkout():
    text = (TEMPLATES / "train.Dockerfile").read_text()
    assert re.search(r"--constraint (\S+)", text)[1] == "constraints.txt"
    (extra,) = re.findall(r"'\.\[(\w+)\]'", text)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert f"REGISTRY/alpro-stream:{VERSION} " in text
    assert "python:3.11" in text


def commands(word):
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", DOCUMENT, re.MULTILINE | re.DOTALL)
    lines = map(str.strip, "\n".join(blocks).replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True) for line in lines if re.match(rf"{word} ", line)]


def configured(words):
    """The configuration of a command, as it would be resolved in a checkout."""
    (path,), overrides = split_arguments(words)
    config = load_config(RunConfig, ROOT / find_config(path), overrides)
    assert 16 in allowed_ranks(config.stream.num_lanes, config.train.engine.num_micro_batches)
    return config


def test_commands_of_training_in_the_document_can_be_resolved():
    found = commands("alpro train")
    assert len(found) >= 5
    for command in found:
        arguments = _parse(command[1:])
        assert arguments.command.__name__ == "_train"
        configured(arguments.arguments)


def test_commands_of_launchers_in_the_document_can_be_resolved():
    after = {"deepspeed": "alpro_launch.preflight", "torchrun": "alpro_launch.train", "sbatch": "train.sbatch"}
    for program, entry in after.items():
        found = commands(program)
        assert found, program
        for command in found:
            place = next(number for number, word in enumerate(command) if word.endswith(entry))
            configured(command[place + 1 :])


def test_files_that_the_document_links_to_exist():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", DOCUMENT):
        assert (ROOT / "docs" / link).exists(), link
