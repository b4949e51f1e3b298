"""A real Slurm of two nodes on this machine, and the batch script of launch/templates."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hosts import ENVIRONMENT, TwoHosts, wait_until

from alpro_launch.launch_log import read_launch_log
from alpro_launch.local_ranks import free_port
from alpro_stream.exit_status import PREEMPTED
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {', '.join(MISSING)}"),
]

CONFIGURATION = """
ClusterName=alpro
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The daemons, with all their files in a folder; they run in the foreground, so that they end with the test."""

    def __init__(self, folder):
        self.folder = folder
        ports = {name: free_port() for name in ("controller", "node1", "node2")}
        host = os.uname().nodename.partition(".")[0]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, **ports))
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o400)
        self.environment = {**os.environ, **ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons = []

    def start(self):
        names = ("key-file=key", "socket=munge.socket", "pid-file=munge.pid", "seed-file=seed", "log-file=munge.log")
        files = [f"--{name.replace('=', f'={self.folder}/')}" for name in names]
        self._daemon("munged", "--foreground", "--force", *files)
        wait_until((self.folder / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: "idle 2" in self("sinfo", "-h", "-o", "%T %D", check=False), 60)

    def __call__(self, *command, check=True):
        done = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True, check=False)
        assert not check or not done.returncode, done.stdout + done.stderr + self.logs()
        return done.stdout.strip()

    def logs(self):
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _daemon(self, *command):
        with (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("w") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def close(self):
        self("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30
        while self("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait()


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir(mode=0o755)
    # munge insists that nobody else could have exchanged its files.
    for parent in [folder, *folder.parents]:
        if parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode & ~0o022)
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.close()


def test_a_job_that_is_asked_to_save_is_queued_again_and_goes_on(slurm, tmp_path):
    hosts = TwoHosts(tmp_path)
    corpus = write_corpus(tmp_path / "corpus")
    hosts.config(corpus, **{"train.max_steps": 400, "train.checkpoint_every": 1000})
    slurm.environment |= {"MASTER_ADDR": "127.0.0.1", "ALPRO_VENV": str(ROOT / ".venv")}
    sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "--overcommit"]
    log = tmp_path / "job.log"
    script = ROOT / "launch/templates/train.sbatch"
    job = slurm("sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", *sizes, script, tmp_path / "run.yaml")

    def state():
        return slurm("squeue", "-h", "-o", "%T", "-j", job, check=False)

    def said():
        return (log.read_text() if log.exists() else "") + slurm.logs()

    class Job:
        printed = staticmethod(said)

    wait_until(lambda: len(read_metrics(hosts.run_dir)) > 2, 120, Job)
    assert "ranks     2 on 2 nodes, as found in the variables of Slurm" in log.read_text()
    assert f"meet at   127.0.0.1:{15_000 + int(job)} through lo" in log.read_text()
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: "status 75: queued again (restart 1)" in log.read_text(), 60, Job)
    (saved,) = complete_checkpoints(hosts.run_dir)
    assert int(saved.name.removeprefix("step-")) < 400
    wait_until(lambda: "400 steps trained" in log.read_text(), 200, Job)
    wait_until(lambda: state() in ("", "COMPLETED"), 30, Job)
    assert [line["step"] for line in read_metrics(hosts.run_dir)] == list(range(1, 401))
    first, second = read_launch_log(hosts.run_dir)
    assert (first["job"], first["requeued"], first["status"], first["ended_at"]) == (job, 0, PREEMPTED, saved.name)
    assert (second["job"], second["requeued"], second["status"], second["begun_from"]) == (job, 1, 0, saved.name)
