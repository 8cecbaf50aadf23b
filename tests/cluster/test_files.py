"""All files of cluster/: what checkers of shell and Dockerfiles say, commands that exist, no secrets, and the course of the Slurm script."""

from __future__ import annotations

import fnmatch
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.templates import CLUSTER, ROOT, fenced, parse_job_command, parse_ray_command, shell_commands, tool

SCRIPTS = sorted(CLUSTER.glob("*.sh"))
PAGES = [CLUSTER / "README.md", ROOT / "SECURITY.md"]
TEXTS = [path for path in sorted(CLUSTER.rglob("*")) if path.is_file() and "__pycache__" not in path.parts] + [ROOT / "SECURITY.md"]
# Forms of real secrets, and assignments of a value to a name that sounds like one.
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|AIza[\w-]{35}|gh[pousr]_\w{36}|-----BEGIN|eyJ[\w-]{10,}\.|xox[abp]-|\b[0-9a-f]{40,}\b"
    r"|(?i:(?:secret|password|passwd|token|access_?key|api_?key)\w*\"?\s*[=:]\s*[\"']?(?![\"']?[\s$({<]|\.{3}|…|token\b|disabled\b)[\w+/-]{6,})"
)
# Paths of secrets, names of Secrets, settings that have to do with tokens, and the head's node id in local.yaml.
NO_SECRET = (
    r"RAY_AUTH_TOKEN_PATH=\S+|AWS_SHARED_CREDENTIALS_FILE=\S+|secretName: [\w-]+|auth_token=/dev/stdin"
    r"|automountServiceAccountToken: false|HttpTokens: required|f{51}0{5}"
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert script.stat().st_mode & stat.S_IXUSR


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = re.sub(NO_SECRET, "", path.read_text())
    assert [match[0] for match in SECRET.finditer(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        "- -e RAY_AUTH_TOKEN=5f1d7a84db00d2fce00b31a7fc73224f",
        'password = "correcthorse"',
        "AKIA" + "IOSFODNN7EXAMPLE",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_secrets_would_be_found(text: str) -> None:
    assert SECRET.search(text)


@pytest.mark.parametrize("path", [*SCRIPTS, *PAGES], ids=name_of)
def test_commands_exist_with_their_options(path: Path) -> None:
    text = fenced(path.read_text()) if path.suffix == ".md" else path.read_text()
    for words in shell_commands(text, "ray"):
        own = words[: words.index("--")] if "--" in words else words
        parse_ray_command([*own, "--", "true"] if "--" in words else own)
        job = words[len(own) + 1 :]
        if job and "$" not in "".join(job):
            parse_job_command(job)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_jobs_on_pages_know_their_options(page: Path) -> None:
    for words in shell_commands(fenced(page.read_text()), "python"):
        if words[1].startswith("jobs/"):
            parse_job_command(words)
    for words in shell_commands(fenced(page.read_text()), "cluster/slurm.sh"):
        parse_job_command(["python", "jobs/cotrain.py", *words[1:]])


def test_pages_name_files_that_are_there() -> None:
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"\b(?:cluster|jobs|tests|cola_dist)/[\w./-]+\.(?:yaml|sh|py|json|md)\b", text))
        assert sorted(name for name in named if not (ROOT / name).exists()) == []
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), link


def test_the_image_gets_the_sources_and_nothing_else() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = {
        word for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1] if not word.startswith("--")
    }
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert fnmatch.fnmatch(base, "python:3.[0-9]*.[0-9]*-slim-*"), "the base is pinned by its version"
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["1000:1000"]


def test_the_image_takes_the_torch_that_the_project_pins() -> None:
    (command,) = re.findall(r"""sed -n '(s/.*?/p)' pyproject\.toml""", (CLUSTER / "Dockerfile").read_text())
    done = subprocess.run(["sed", "-n", command, str(ROOT / "pyproject.toml")], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\n", done.stdout)


# The Slurm script, with stand-ins for what a Slurm cluster has. Each writes down what it was called with.

STAND_INS = {
    "scontrol": "echo node-a; echo node-b; echo node-c",
    # What srun would start on a node: `hostname`, or `ray start --block`, which runs until it is told to end.
    "srun": 'while [[ $1 == --* ]]; do shift; done; if [[ $1 == hostname ]]; then echo 10.0.0.1 ::1; else exec "$@"; fi',
    "ray": """
case "$1 ${2:-}" in
"start "*) trap 'echo "ended $*" >>"$CALLS"; exit 0' TERM; test -s "$RAY_AUTH_TOKEN_PATH" || exit 9
    echo up >>"$CALLS"; while true; do sleep 0.05; done ;;
"job submit") # Nodes that are told to end before they listen would end unseen.
    while (( $(grep -c "^up" "$CALLS") < 3 )); do sleep 0.05; done
    stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >>"$CALLS"; while [[ ! -e $CALLS.stop ]]; do sleep 0.05; done; exit "$(cat "$CALLS.stop")" ;;
"status "*) test ! -e "$CALLS.down" ;;
"job stop") echo 0 >"$CALLS.stop" ;;
esac
""",
}


def run_slurm_script(folder: Path, until: str = "token ") -> tuple[subprocess.Popen[str], Path]:
    programs, calls, home = folder / "bin", folder / "calls", folder / "home"
    for made in (programs, home):
        made.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        (programs / name).chmod(0o755)
    environment: Mapping[str, str] = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "CALLS": str(calls),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(CLUSTER / "slurm.sh"), "small", "--train.workers", "12"]
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while until not in (calls.read_text() if calls.exists() else ""):
        assert script.poll() is None, script.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return script, calls


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_runs_the_job_on_all_nodes_and_ends_the_cluster(tmp_path: Path, code: int) -> None:
    script, calls = run_slurm_script(tmp_path)
    Path(f"{calls}.stop").write_text(str(code))
    output = script.communicate(timeout=60)[0]
    assert script.returncode == code, output
    lines = calls.read_text().splitlines()
    starts = [line for line in lines if line.startswith("ray start")]
    assert len([line for line in starts if "--head" in line]) == 1
    assert len([line for line in starts if "--address=10.0.0.1:24711" in line]) == 2
    assert all("--num-cpus=16 --num-gpus=4" in line for line in starts)
    assert len([line for line in lines if line.startswith("ended start")]) == 3, "nodes are left behind"
    (submitted,) = [line for line in lines if line.startswith("ray job submit")]
    assert submitted.endswith(f"python {ROOT}/jobs/cotrain.py small --train.workers 12")
    assert "token 600" in lines
    assert list((tmp_path / "home").iterdir()) == [], "the token is left behind"


def test_slurms_warning_stops_the_job_before_the_nodes(tmp_path: Path) -> None:
    script, calls = run_slurm_script(tmp_path)
    os.kill(script.pid, signal.SIGTERM)
    output = script.communicate(timeout=60)[0]
    assert script.returncode == 0, output
    lines = calls.read_text().splitlines()
    assert "ray job stop --address http://127.0.0.1:44711 cola-4711" in lines
    ended = [number for number, line in enumerate(lines) if line.startswith("ended start")]
    assert len(ended) == 3
    assert min(ended) > next(number for number, line in enumerate(lines) if line.startswith("ray job stop"))
    assert list((tmp_path / "home").iterdir()) == []


def test_a_cluster_that_never_starts_is_ended_by_slurms_warning(tmp_path: Path) -> None:
    (tmp_path / "calls.down").touch()
    script, calls = run_slurm_script(tmp_path, until="ray status")
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.killpg(script.pid, 0)
    assert "job submit" not in calls.read_text()
    assert list((tmp_path / "home").iterdir()) == []
