"""A real Slurm cluster of two nodes on this machine: its own munge key, ports and folders, started and torn down."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged", "mungekey")
NODES = ("n1", "n2")
# cred_expire is also how long a requeued job waits (120 seconds by default), sched_interval how often jobs are started.
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
SlurmdSpoolDir={folder}/%n/spool
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=100000
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str:
    """Install what is missing of Slurm, as root with apt. Returns why that cannot be or shall not be, or nothing."""
    if os.environ.get("LONGSPLASH_SLURM_TESTS") == "0":
        return "LONGSPLASH_SLURM_TESTS is 0"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and (os.geteuid() != 0 or shutil.which("apt-get") is None):
        return f"{', '.join(missing)} not found; installing Debian's {', '.join(PACKAGES)} needs root and apt-get"
    if os.geteuid() != 0:
        return "starting slurmd for both nodes needs root"
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"apt-get {command[0]} failed: {done.stderr.strip()[-500:]}"
    return ""


DEADLINE = 600.0  # seconds, for what should take a tenth of it: beside other work a machine can be that slow


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} seconds"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Job:
    """A submitted batch job."""

    def __init__(self, cluster: "Cluster", number: str, output: Path) -> None:
        self.cluster, self.number, self.path = cluster, number, output

    @property
    def output(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, as JobState, Restarts or ExitCode."""
        shown = self.cluster.call("scontrol", "show", "job", "--oneliner", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def signal(self, name: str) -> None:
        """As --signal does: to the batch script."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.number)

    def wait(self, seconds: float = DEADLINE) -> str:
        """The state in which the job ends."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.field("JobState") in ended, f"job {self.number}\n{self.output}", seconds)
        return self.field("JobState")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", *(f"{node}/spool" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        config = CONFIG.format(host=socket.gethostname().split(".")[0], folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(config)
        munge = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
        self.call("mungekey", "--create", f"--keyfile={munge['key']}")
        paths = [f"--{name}-file={munge[name]}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge['socket']}", *paths)
        wait_until(munge["socket"].exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(self._idle, f"two idle nodes; logs in {self.folder}")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.{len(self.daemons)}.out").open("wb") as out:
            daemon = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
        self.daemons.append(daemon)

    def _idle(self) -> bool:
        for daemon in self.daemons:
            assert daemon.poll() is None, f"{daemon.args} ended with {daemon.returncode}; logs in {self.folder}"
        with suppress(subprocess.CalledProcessError):
            return self.call("sinfo", "--noheader", "--states=idle", "--format=%D").split() == ["2"]
        return False

    def stop(self) -> None:
        """End all jobs and daemons and wait for them."""
        with suppress(subprocess.CalledProcessError, AssertionError):
            self.call("scancel", "--user=root")
            wait_until(lambda: not self.call("squeue", "--noheader"), "the end of all jobs", 30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        done.check_returncode()
        return done.stdout

    def submit(
        self, script: Path, *arguments: object, sbatch: tuple[str, ...] = (), cwd: Path, **variables: str
    ) -> Job:
        """Run sbatch in a folder, with environment variables."""
        output = self.folder / f"job-{script.stem}-{time.monotonic_ns()}.out"
        command = ["sbatch", "--parsable", f"--output={output}", *sbatch, str(script), *map(str, arguments)]
        environment = {**self.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), output)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
