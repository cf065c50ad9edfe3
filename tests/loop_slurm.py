"""A SLURM of one node on loopback, with accounting: munge, MariaDB, slurmdbd, slurmctld and slurmd from Debian's packages.

Everything lies in one folder under /tmp and listens on ports of its own; nothing of a SLURM that may be there is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
CONF = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={at}/munge.sock
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
MessageTimeout=10
GresTypes=gpu,shard
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:2,shard:8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""
GRES = "NodeName={host} Name=gpu File=/dev/tty[1-2]\nNodeName={host} Name=shard Count=8\n"  # no GPU is asked for its sake
DBD = """
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=loop
StorageLoc=slurm_acct_db
PidFile={at}/slurmdbd.pid
"""


def lacking() -> str | None:
    """Why there can be no SLURM here."""
    if os.geteuid() != 0:
        return "only root can start a SLURM"
    missing = [name for name in DAEMONS if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm slurmdbd munge mariadb-server)" if missing else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{what} did not come about in {seconds} s"
        time.sleep(0.2)


class Loop:
    """with Loop() as slurm: its commands work where SLURM_CONF is set as in slurm.env."""

    def __enter__(self) -> Loop:
        self.at = Path(tempfile.mkdtemp(prefix="loop", dir="/tmp"))  # short: sockets lie in there
        self.processes: dict[str, subprocess.Popen] = {}
        self.env = os.environ | {"SLURM_CONF": f"{self.at}/slurm.conf"}
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self) -> None:
        at, host = self.at, socket.gethostname().partition(".")[0]
        ports = {name: free_port() for name in ("ctld", "slurmd", "dbd", "sql")}
        for name, text in (("slurm", CONF), ("gres", GRES), ("slurmdbd", DBD)):
            (path := at / f"{name}.conf").write_text(text.format(at=at, host=host, **ports))
            path.chmod(0o600 if name == "slurmdbd" else 0o644)
        for name in ("state", "spool"):
            (at / name).mkdir()
        (at / "munge.key").write_bytes(os.urandom(1024))
        (at / "munge.key").chmod(0o600)
        at.chmod(0o755)
        files = [f"--{name}={at}/munge.{name[:4]}" for name in ("pid-file", "log-file", "seed-file")]
        self.daemon("munged", "-F", "--force", f"--socket={at}/munge.sock", f"--key-file={at}/munge.key", *files)
        self.make_database()
        sock = f"--socket={at}/sql.sock"
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
        where = [f"--datadir={at}/db", sock, f"--port={ports['sql']}", "--bind-address=127.0.0.1", f"--pid-file={at}/sql.pid"]
        self.daemon("mariadbd", "--no-defaults", "--user=root", *where, *small)
        sql = (
            "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'loop'; "
            "grant all on slurm_acct_db.* to slurm@'127.0.0.1'"
        )
        until(lambda: subprocess.run(["mariadb", sock, "-e", sql], capture_output=True).returncode == 0)
        self.daemon("slurmdbd", "-D")
        until(lambda: self.run("sacctmgr", "-i", "add", "cluster", "loop").returncode == 0 or self.known())
        self.control()
        self.daemon("slurmd", "-D", "-N", host)
        until(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"])

    def make_database(self) -> None:
        """It has failed once, for a reason not seen, beside another of its kind; what it says the third time is shown."""
        where = f"--datadir={self.at}/db"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", where, "--skip-test-db"]
        for _ in range(3):
            made = subprocess.run([*install, "--auth-root-authentication-method=socket"], capture_output=True, text=True)
            if made.returncode == 0:
                return
            shutil.rmtree(self.at / "db", ignore_errors=True)
        raise RuntimeError(f"mariadb-install-db: {made.stdout[-1000:]} {made.stderr[-1000:]}")

    def known(self) -> bool:
        return "loop" in self.run("sacctmgr", "-n", "-P", "show", "cluster", "format=cluster").stdout

    def control(self) -> None:
        """Start slurmctld, for the first time or again."""
        self.daemon("slurmctld", "-D")

    def daemon(self, name: str, *words: str) -> None:
        log = open(self.at / f"{name}.log", "ab")  # noqa: SIM115
        self.processes[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", shutil.which(name), *words], env=self.env, stdout=log, stderr=log
        )

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)

    def hurry(self, job: str, seconds: float = 60, **more: str) -> None:
        """Start a job that is queued again, in `seconds` at most, now, not in two minutes. more: what else changes of it."""
        until(lambda: self.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip() == "PENDING", seconds)
        time.sleep(6)  # until what its first start was allowed by has expired
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", *(f"{k}={v}" for k, v in more.items()))

    def __exit__(self, *_) -> None:
        with contextlib.suppress(Exception, AssertionError):
            self.run("scancel", "--user=root")
            until(lambda: not self.run("squeue", "-h").stdout, 30)  # or else its slurmstepd would be left behind
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.at, ignore_errors=True)
