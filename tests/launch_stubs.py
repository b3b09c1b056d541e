"""Commands that stand in for gcloud, kubectl, sbatch and others on PATH, and record how they are called."""

import os
import shlex
import subprocess
from pathlib import Path

from conftest import ROOT

# Every stub begins so: a line of `calls` per call, as a shell would read it.
PREAMBLE = """#!/usr/bin/env bash
set -eu
here={folder}
printf '%q ' {name} "$@" >>"$here/calls"
echo >>"$here/calls"
"""


class Stubs:
    """A folder with stubs in bin/, first on the PATH of the commands that `run` starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()

    def add(self, name: str, body: str = "") -> None:
        """Put a stub on PATH; its `body` is Bash and finds the folder as $here."""
        file = self.folder / "bin" / name
        file.write_text(PREAMBLE.format(folder=shlex.quote(str(self.folder)), name=name) + body)
        file.chmod(0o755)

    def run(self, *command: str, path: str = os.environ["PATH"], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the repository with the stubs first on PATH."""
        return subprocess.run(
            [*command],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{self.folder}/bin:{path}"} | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def calls(self, *words: str) -> list[list[str]]:
        """Return the recorded calls that have all `words` among theirs."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(shlex.split, lines) if set(words) <= set(call)]
