"""Start the processes of one run on this machine.

    python launch/local.py --processes 2 -- --config configs/quickstart.py --workdir runs/quickstart

What follows `--` goes to psp_jax.main unchanged, with --coordinator, --num_processes and --process_id after it. Every
line of output bears the rank of its process. When a process fails the others are ended, and its exit code is this
command's (128 + n for one that signal n ended). Processes that SIGTERM reached save, and end with code 75: all start
again, which is no failure. SIGINT, SIGTERM and SIGHUP to this command reach every process, and nothing starts again.
One process drives all GPUs of a machine by itself; several share them out by --gpus_per_process.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

PREEMPTED = 75  # exit code of psp_jax.main after SIGTERM: saved, start it again
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one when its terminal is closed


class Run:
    """The processes of one start; each leads a process group, which its own children belong to."""

    def __init__(self, command: list[str], environments: list[dict[str, str]]) -> None:
        """Start `command` once per environment, told of the others by a coordinator on a free port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        shared = [*command, f"--coordinator={address}", f"--num_processes={len(environments)}"]
        for rank, environment in enumerate(environments):
            process = subprocess.Popen(
                [*shared, f"--process_id={rank}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches this launcher only, which forwards it once
            )
            self.processes.append(process)
        self._pumps = [threading.Thread(target=self._pump, args=(r,), daemon=True) for r in range(len(environments))]
        watches = [threading.Thread(target=self._watch, args=(r,), daemon=True) for r in range(len(environments))]
        for thread in (*self._pumps, *watches):
            thread.start()

    def _pump(self, rank: int) -> None:
        stream = self.processes[rank].stdout
        assert stream is not None
        for line in stream:
            say(line.decode(errors="replace").rstrip("\n"), rank)

    def _watch(self, rank: int) -> None:
        self.ended.put((rank, self.processes[rank].wait()))

    def signal_all(self, number: int) -> None:
        """Send a signal to every process and its children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self, grace: float, signals: list[int]) -> int:
        """Return 0 when all processes have ended well, or the exit code of the first that did not.

        Forwards what appears in `signals`. From the first failure or signal on, the processes have `grace` seconds to
        end before they are killed; a second signal kills at once.
        """
        code, deadline, left, forwarded = 0, float("inf"), len(self.processes), 0
        while left:
            for number in signals[forwarded:]:
                self.signal_all(signal.SIGKILL if forwarded else number)
                deadline = min(deadline, time.monotonic() + grace)
                forwarded += 1
            if time.monotonic() >= deadline:
                self.signal_all(signal.SIGKILL)
            try:
                rank, ended = self.ended.get(timeout=0.1)
            except queue.Empty:
                continue
            left -= 1
            if ended and not code:
                code = ended if ended > 0 else 128 - ended
                say(f"process {rank} ended with code {code}; the others have {grace:.0f} s to end")
                if not signals:
                    if code != PREEMPTED:  # then the others are saving, too
                        self.signal_all(signal.SIGTERM)
                    deadline = time.monotonic() + grace
        self.signal_all(signal.SIGKILL)  # children that outlived their process
        for pump in self._pumps:
            pump.join(timeout=5)
        return code


def say(text: str, rank: int | None = None) -> None:
    """Print a line of process `rank`, or of the launcher itself, whole."""
    sys.stdout.write(f"[{'launch' if rank is None else rank}] {text}\n")
    sys.stdout.flush()


def environments(processes: int, gpus: int) -> list[dict[str, str]]:
    """Return the environment of each process; with `gpus` > 0 each sees that many GPUs of those visible here.

    Raises:
      ValueError: fewer GPUs are visible than the processes need.
    """
    common = os.environ | {"PYTHONUNBUFFERED": "1"}  # lines come when they are written, though into a pipe
    if not gpus:
        return [common] * processes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes * gpus)))).split(",")
    if len(visible) < processes * gpus:
        raise ValueError(
            f"{processes} processes of {gpus} GPUs need {processes * gpus}; CUDA_VISIBLE_DEVICES names {len(visible)}."
        )
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(visible[r * gpus : (r + 1) * gpus])} for r in range(processes)]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line at `--` into this launcher's options and the run's arguments."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        usage="python launch/local.py [options] -- --config ... --workdir ...", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--processes", type=int, default=2, help="processes to start (2)")
    parser.add_argument("--gpus_per_process", type=int, default=0, help="GPUs that each sees (0: leave it as it is)")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start all anew after a failure (0)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds between asking to end and killing (30)")
    parser.add_argument("--program", default="psp_jax.main", help="module to run (psp_jax.main)")
    options = parser.parse_args(argv[:cut])
    if options.processes < 1:
        parser.error("--processes must be at least 1.")
    if not argv[cut + 1 :]:
        parser.error(f"the arguments of {options.program} must follow --.")
    return options, argv[cut + 1 :]


def main(argv: list[str]) -> int:
    """Run until success, a signal, or the last restart has failed; return the exit code."""
    options, arguments = parse(argv)
    try:
        spaces = environments(options.processes, options.gpus_per_process)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signals: list[int] = []
    for number in FORWARDED:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means that it shall not end
            signal.signal(number, lambda received, _: signals.append(received))
    restarts = 0
    while True:
        code = Run([sys.executable, "-m", options.program, *arguments], spaces).wait(options.grace, signals)
        if not code or signals or (code != PREEMPTED and restarts == options.restarts):
            return code
        restarts += code != PREEMPTED
        say("start again after SIGTERM" if code == PREEMPTED else f"restart {restarts} of {options.restarts}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
