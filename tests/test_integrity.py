"""What tells that a checkpoint is not what was in memory, in one process and in two."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment, free_address
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_checkpoint import identical, state, steps_in

from psp_jax import integrity
from psp_jax.checkpoint import Checkpoints
from psp_jax.integrity import array_sums

# Saves the steps 1 and 2, and 2 once more, as one of two processes; the second one is as if other bits were in memory.
PROGRAM = """
import sys
from pathlib import Path
import jax
from test_checkpoint import state
from psp_jax import checkpoint, parallel, processes

processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
checkpoints, sums = checkpoint.Checkpoints(Path(sys.argv[3]), keep_latest=1), checkpoint.array_sums
for step, changed in ((1, False), (2, True), (2, False)):
    checkpoint.array_sums = (lambda tree: [1]) if changed else sums
    on_both = parallel.to_replicated(jax.device_get(state(step)), parallel.make_mesh())
    checkpoints.save(step, on_both, None)
    if changed:
        checkpoints._settle()
        print(checkpoints.latest_step(), sorted(path.name for path in Path(sys.argv[3]).iterdir()))
checkpoints.close()
print(checkpoints.latest_step())
processes.wait_for_all("end")
"""


@pytest.mark.slow
def test_two_processes_learn_that_what_is_read_back_is_wrong_without_waiting_in_vain(tmp_path: Path) -> None:
    address, both = free_address(), []
    for rank in ("0", "1"):
        command = [sys.executable, "-c", PROGRAM, address, rank, str(tmp_path / "c")]
        variables = environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        pipe = subprocess.PIPE
        both.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True))
    for rank, process in enumerate(both):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        told = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert told == ["1 ['1', 'damaged-2']", "2"]
        assert "The checkpoint of step 2 could not be saved in " in err and "is not what was written" in err
        assert ("process 1: The checkpoint" in err) == (rank == 1)
    assert steps_in(tmp_path / "c") == ["2", "damaged-2"]
    identical(Checkpoints(tmp_path / "c").restore(2, state(0)), state(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_sums_change_with_every_bit_and_with_no_device(dtype: str) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (8, 6)).astype(np.uint8).astype(jnp.dtype(dtype))
    bits = values.view(f"uint{8 * values.dtype.itemsize}").astype(object).reshape(-1)
    expected = int(sum(b * (2 * i + 1) for i, b in enumerate(bits))) % 2**32
    spread = jax.device_put(values, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")))
    assert array_sums([jnp.asarray(values)]) == array_sums([spread]) == [expected] == [integrity._host_sum(values)]
    for i in range(values.nbytes * 8):
        changed = np.frombuffer(values.tobytes(), np.uint8).copy()
        changed[i // 8] ^= 1 << i % 8
        assert integrity._host_sum(changed.view(values.dtype)) != expected
