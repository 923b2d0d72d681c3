"""benchmark.sh on a Slurm cluster of one machine. Not part of `python -m pytest`, because it needs Slurm:

apt-get install slurm-wlm munge
python -m pytest -n 0 tests/slurm.py
"""

import filecmp
import glob
import os
import pwd
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, wait_for

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=small Nodes={host} Default=YES MaxTime=INFINITE
"""
FLAGS = ["--no-compile", "--learning-starts=100", "--batch-size=16", "--eval-frequency=100", "--eval-episodes=1"]
SETTINGS = {"ENVS": "tests.fake_envs:Slow-v0", "SCRIPTS": "smoothie_continuous smoothie_no_kl ddpg_continuous", "SEEDS": "1"}
SETTINGS |= {"TOTAL_TIMESTEPS": "1500", "PYTHON": sys.executable}  # 30 seconds for each run


def call(*command, **settings):
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS | settings)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Start munged, slurmctld and slurmd with their files in tmp_path/slurm."""
    folder = tmp_path / "slurm"
    (folder / "munge").mkdir(parents=True)
    for path in (folder, folder / "munge"):
        path.chmod(0o755)  # munged requires it
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, user=user, folder=folder, ports=ports))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    daemons = [
        ["munged", "--foreground", "--force", *[f"--{option}={folder}/munge/{name}" for option, name in munge.items()]],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    processes = []
    try:
        for daemon in daemons:
            processes.append(subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            wait_for((folder / "munge" / "socket").exists, "munged", 20)
        wait_for(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout, "an idle node", 60)
        yield
    finally:
        subprocess.run(["scancel", "--user", user], capture_output=True)
        for process in reversed(processes):
            process.terminate()
            process.wait()


def test_a_job_array_with_interrupted_tasks_equals_the_local_run(slurm, tmp_path):
    """One task is requeued and one is warned of its time limit. Both resume, and the results are those of a local run."""
    benchmark = os.path.join(ROOT, "benchmark.sh")
    cluster = {"RUNS": str(tmp_path / "cluster")}

    def steps(script):
        rows = [row for path in glob.glob(f"cluster/runs/*{script}*/evaluations.csv") for row in open(path)]
        return int(rows[-1].split(",")[0]) if len(rows) > 1 else 0

    out = call(benchmark, *FLAGS, "--slurm", "--partition=small", "--time=10", **cluster)
    job = re.match(r"job array (\d+): 3 cells", out)[1]
    for task, script, interrupt in [
        (0, "smoothie_continuous", ["scontrol", "requeue", f"{job}_0"]),
        (1, "smoothie_no_kl", ["scancel", f"--signal={signal.SIGUSR1.name}", "--batch", f"{job}_1"]),
    ]:
        wait_for(lambda script=script: steps(script) >= 500, f"a third of {script}")
        call(*interrupt)
        wait_for(lambda task=task: "BeginTime" in call("squeue", "-h", "-j", f"{job}_{task}", "-o", "%r"), "the requeue")
        assert 500 <= steps(script) < 1500
        assert re.search(rf"{script} +0 +0 +0 +1 .*\d$", call(benchmark, "--status", **cluster), re.M)  # waiting, with a return
        call("scontrol", "update", f"JobId={job}_{task}", "StartTime=now")  # Slurm holds requeued tasks back for two minutes
    wait_for(lambda: call("squeue", "-h") == "", "the end of all jobs")
    assert "3 cells: 3 done" in call(benchmark, "--status", **cluster)
    assert "all cells are finished" in call(benchmark, "--slurm", **cluster)
    for task in (0, 1):
        with open(f"cluster/slurm-{job}_{task}.log") as file:
            assert file.read().count("--resume runs/tests.fake_envs-Slow-v0__") == 1

    call(benchmark, *FLAGS, RUNS=str(tmp_path / "local"))
    for script in SETTINGS["SCRIPTS"].split():
        ours, theirs = [glob.glob(f"{where}/runs/*{script}*/evaluations.csv")[0] for where in ("cluster", "local")]
        assert filecmp.cmp(ours, theirs, shallow=False), script
    data = sorted(os.listdir("local/results/data"))
    assert data and sorted(os.listdir("cluster/results/data")) == data, "the job after the array draws the figures"
