"""The launchers' shell scripts are clean, and every command of their README is one that they take."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
COMMANDS = [
    line.strip()
    for line in (ROOT / "launch" / "README.md").read_text().splitlines()
    if line.startswith(("    launch/", "    python launch/"))
]


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not tool:
        pytest.skip("shellcheck is not installed; the extra `test` has it.")
    result = subprocess.run([tool, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_scripts_that_run_are_strict():
    programs = [script for script in SCRIPTS if os.access(script, os.X_OK)]
    assert [p.name for p in programs] == ["cloud_tpu.sh", "slurm.sh", "tpu_worker.sh"]
    for script in programs:
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines[:6], script


def test_every_launcher_is_in_the_readme():
    told = {shlex.split(command.removeprefix("python "))[0] for command in COMMANDS}
    assert told == {"launch/local.py", "launch/cloud_tpu.sh", "launch/slurm.sh", "launch/gke.py"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "local.py" not in c])
def test_commands_of_the_readme_are_taken(command):
    words = shlex.split(command)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    cut = words.index("--") if "--" in words else len(words)
    result = subprocess.run(
        [*words[:cut], "--dry_run", *words[cut:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "psp" in result.stdout


@pytest.mark.parametrize("script", ["cloud_tpu.sh", "slurm.sh"])
def test_help_tells_every_option(script):
    text = (ROOT / "launch" / script).read_text()
    parse = text[text.index("\nparse() {") :]
    options = set(re.findall(r"--[a-z_]+", parse[: parse.index("\n}\n")])) - {"--help"}
    shown = subprocess.run([ROOT / "launch" / script, "--help"], capture_output=True, text=True, check=True).stdout
    assert len(options) > 8 and not {option for option in options if f"{option} " not in shown}
