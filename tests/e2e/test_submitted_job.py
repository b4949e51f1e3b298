"""Jobs submitted to a cluster whose nodes have the libraries of the templates and nothing else."""

import contextlib
import importlib.metadata
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from shard_runs import DEMO, MARK, ROOT, contents, processes_of

from alpro_stream.shards import load_dataset_info

TEMPLATES = ROOT / "launch/templates"
REQUIREMENTS = TEMPLATES / "requirements-sharding.txt"
BUCKET = "corpus"


def wanted_distributions():
    """Names of the distributions that installing the requirements would bring, theirs included."""
    waiting = [Requirement(line) for line in REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    found = set()
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for text in importlib.metadata.requires(requirement.name) or ():
            needed = Requirement(text)
            markers = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(needed.marker.evaluate(marker) for marker in markers):
                waiting.append(needed)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """An environment with the libraries of the requirements, as links to those of this one."""
    folder = tmp_path_factory.mktemp("nodes") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for name in wanted_distributions():
        for top in {file.parts[0] for file in importlib.metadata.files(name) if file.parts[0] != ".."}:
            source = Path(importlib.metadata.distribution(name).locate_file(top))
            if source.exists() and not (target / top).exists():
                (target / top).symlink_to(source)
    start = f"#!{folder}/bin/python\nfrom ray.scripts.scripts import main\nmain()\n"
    (folder / "bin/ray").write_text(start)
    (folder / "bin/ray").chmod(0o755)
    (folder / "installed-requirements.txt").write_bytes(REQUIREMENTS.read_bytes())
    return folder


def test_the_nodes_have_neither_the_project_nor_torch(venv):
    for package in ("alpro_stream", "alpro_sharding", "torch", "transformers"):
        result = subprocess.run([venv / "bin/python", "-I", "-c", f"import {package}"], capture_output=True, text=True)
        assert f"No module named '{package}'" in result.stderr


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition, seconds, what):
    for _ in range(2 * seconds):
        if condition():
            return
        time.sleep(0.5)
    pytest.fail(what)


@pytest.fixture(scope="module")
def cluster(venv, tmp_path_factory):
    """Two nodes on this machine, started by the script; gives what submits, and the folder of the second node."""
    work = tmp_path_factory.mktemp("cluster")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "PYTHONPATH"))}
    # A token of its own, so that nobody's real one is used.
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "ALPRO_VENV": str(venv), MARK: str(work)}
    port, dashboard, *others = free_ports(8)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    agent_ports = [
        [f"--{name}={value}" for name, value in zip(names, three, strict=True)] for three in (others[:3], others[3:])
    ]
    script = str(TEMPLATES / "ray-cluster.sh")
    first = [script, "head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=1", *agent_ports[0]]
    # Ray unpacks a job's code anew on every node: in one folder, the second node would pull it away from the first.
    own_folder = tempfile.TemporaryDirectory(prefix="ray_")  # in /tmp: the path of a socket has 107 characters at most
    second = [script, "join", f"127.0.0.1:{port}", "--num-cpus=1", f"--temp-dir={own_folder.name}", *agent_ports[1]]
    ray = [str(venv / "bin/ray")]

    def run(*command):
        return subprocess.run([*ray, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)

    def num_nodes():
        printed = run("status", "--address", f"127.0.0.1:{port}").stdout
        return printed.partition("Active:")[2].partition("Pending:")[0].count("node_")

    def submit(options, entrypoint):
        address = f"http://127.0.0.1:{dashboard}"
        for _ in range(60):
            result = run("job", "submit", "--address", address, *options, "--", *entrypoint)
            if "submitted successfully" in result.stdout:
                break
            time.sleep(1)  # A cluster that has just started refuses for some seconds.
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(own_folder)
        log = stack.enter_context((work / "nodes.log").open("w"))
        nodes = []
        stack.callback(wait_until, lambda: not processes_of(str(work)), 60, "the nodes left processes behind")
        for command, number in ((first, 1), (second, 2)):
            nodes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            stack.callback(lambda node=nodes[-1]: (node.terminate(), node.wait(timeout=60)))
            wait_until(
                lambda number=number: num_nodes() == number, 60, f"node {number} did not start: {work / 'nodes.log'}"
            )
        yield submit, Path(own_folder.name), (others[2], others[5])


def counted(ports, name):
    """Sum of a counter over everything that the nodes tell Prometheus."""
    total = 0.0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith(f"ray_{name}{{"))
    return total


@pytest.mark.slow
def test_a_job_from_the_checkout_gives_the_shards_of_a_local_run(cluster, tmp_path):
    job = ["python", "-m", "sharding", DEMO, f"work_dir={tmp_path / 'job'}", "samples_per_shard=4"]
    submit, second_node, metrics_ports = cluster
    result = submit(["--working-dir", "."], job)
    assert result.returncode == 0, result.stdout + result.stderr
    num_rows = len((ROOT / "examples/clips/manifest.jsonl").read_text().splitlines())
    wait_until(lambda: counted(metrics_ports, "alpro_shard_rows_total") == num_rows, 30, "the dashboard has no rows")
    assert list(second_node.glob("session_*/runtime_resources/py_modules_files/*/alpro_sharding")), "it had no work"
    local = [sys.executable, "-m", "sharding", DEMO, f"work_dir={tmp_path / 'local'}", "samples_per_shard=4"]
    subprocess.run(local, cwd=ROOT, check=True, capture_output=True, timeout=200)
    made, expected = contents(tmp_path / "job/shards"), contents(tmp_path / "local/shards")
    assert made == expected
    assert sum(name.endswith(".tar") for name in made) > 5


@pytest.fixture
def store(monkeypatch):
    """An S3 server with the first example clips; gives the variables that lead to it."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for clip in example_clips():
        client.upload_file(str(clip), BUCKET, clip.name)
    yield variables
    server.stop()


def example_clips():
    return sorted((ROOT / "examples/clips/videos").iterdir())[:4]


@pytest.mark.slow
def test_the_kubernetes_job_runs_from_its_archive_on_media_in_s3(cluster, store, tmp_path):
    """The entry point and the runtime environment of the template, on a folder in place of the shared volume."""
    spec = yaml.safe_load((TEMPLATES / "kuberay-shard.yaml").read_text())["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"].replace("/shared/", f"{tmp_path}/"))
    entrypoint = [word.replace("/shared/", f"{tmp_path}/") for word in shlex.split(spec["entrypoint"])]
    with zipfile.ZipFile(tmp_path / "alpro-stream.zip", "w") as archive:
        for folder in ("alpro_stream", "sharding", "configs"):
            for path in sorted((ROOT / folder).rglob("*")):
                if path.is_file() and path.suffix != ".pyc":
                    archive.write(path, "alpro-stream" / path.relative_to(ROOT))
    rows = [
        {"id": clip.stem, "media": f"s3://{BUCKET}/{clip.name}", "captions": ["a dog on a beach"]}
        for clip in example_clips()
    ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runtime = json.dumps({**environment, "env_vars": store})
    submit, *_ = cluster
    result = submit(["--runtime-env-json", runtime], entrypoint)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "shards/failures.jsonl").read_text() == ""
    assert load_dataset_info(tmp_path / "shards/train").num_samples == len(rows)
