"""Train or evaluate a segmentation network.

    python -m psp_jax.main --config configs/ade20k.py --workdir runs/ade20k
    python -m psp_jax.main --config configs/ade20k.py --workdir runs/ade20k --mode evaluate

Started again with the same command, a run goes on from its newest checkpoint.
"""

from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from psp_jax import agreement, compile_cache, processes
from psp_jax.command import run_command
from psp_jax.config_file import check_type, parse_problem
from psp_jax.data.prepared import describe, ensure_prepared
from psp_jax.data.source import Source, open_source
from psp_jax.evaluate import evaluate
from psp_jax.train import check_run, train
from psp_jax.workdir import ModelCard, check_free, environment, versions

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration, for example configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_RESUME = flags.DEFINE_enum(
    "resume",
    "auto",
    ["auto", "override"],
    "A workdir with checkpoints goes on from the newest. auto refuses where the configuration changed in a field that "
    "decides what is learned; override accepts the change.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, or auto (Cloud TPU, GKE's TPUs, SLURM, Open MPI)."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Rank of this process, with --coordinator.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds that the processes of the run have to come together.", lower_bound=1
)
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Directory that keeps compiled programs for the next start, or off. By default JAX_COMPILATION_CACHE_DIR, or else "
    "~/.cache/psp_jax/compilation, and .psp_jax_compilation beside the workdir where a run has several processes.",
)


def _parse_flags(argv: list[str]) -> list[str]:
    # Without this a missing file is told in five lines, and only when the configuration is first looked at.
    named = ""
    for name, following in zip(argv, [*argv[1:], ""], strict=True):
        file = following if name == "--config" else name.removeprefix("--config=")
        if file != name and not Path(file.partition(":")[0]).is_file():
            raise FileNotFoundError(
                f"There is no configuration file {file.partition(':')[0]}; the repository's are in configs/."
            )
        named = named if file == name else file
    try:
        rest = flags.FLAGS(argv)
        missing = [f"--{name}" for name in ("config", "workdir") if not flags.FLAGS[name].value]
    except Exception as error:  # a configuration file is a program
        raise ValueError(parse_problem(error, named, argv)) from error
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given; see --help.")
    if len(rest) > 1:
        raise ValueError(f"Unexpected argument {rest[1]}; every option starts with --.")
    check_type(_CONFIG.value, config_flags.get_config_filename(flags.FLAGS["config"]))
    return rest


def _sources(config: ConfigDict, hosts: list[str], splits: tuple[str, ...]) -> list[Source]:
    """Prepare the data set if it is not, on one process while the others wait, open `splits`, and compare hosts."""
    data = config.data
    if not data.dir:
        raise ValueError("config.data.dir is empty; set --config.data.dir=DIR to the folder of your data set.")
    where: dict[str, Any] = {"prepared_dir": data.prepared_dir, "classes": data.classes or None}
    if processes.is_primary():
        directory = ensure_prepared(data.name, data.dir, archive=data.archive or None, **where)
        print(describe(directory), flush=True)
    processes.wait_for_all("prepare")
    sources = [open_source(data.name, data.dir, split, **where) for split in splits]
    agreement.check_same("data", agreement.of_data(sources), hosts, _START_TIMEOUT.value)
    return sources


def _meet(config: ConfigDict) -> list[str]:
    """Start together with the other processes, refuse what they do not have in common, and return their hosts."""
    seconds = _START_TIMEOUT.value
    processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, seconds)
    primary = processes.rank() == 0
    if primary and (variables := environment()):  # before XLA aborts over one that it does not know
        print("environment:", *(f"{name}={value}" for name, value in variables.items()), flush=True)
    hosts = agreement.gather_hosts(seconds)
    names = [host.name for host in hosts]
    if primary and len(hosts) > 1:
        print(agreement.table(hosts), flush=True)
    command = {"--mode": _MODE.value, "--resume": _RESUME.value} | versions()
    agreement.check_same("start", agreement.of_configuration(config, command), names, seconds)
    agreement.check_hosts(hosts, config.mesh.devices)  # the configuration is the same by now: all refuse, or none
    return names


def _run(_: list[str]) -> None:
    config = FrozenConfigDict(_CONFIG.value)
    check_run(config)
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save otherwise, and warns without a reason
    hosts = _meet(config)
    directory = Path(str(_WORKDIR.value))
    if processes.rank() == 0:
        check_free(directory)  # before data are prepared, which takes minutes; held it is later
    compile_cache.enable(_COMPILE_CACHE.value or compile_cache.default_directory(directory, len(hosts)))
    if _MODE.value == "train":
        train_source, eval_source = _sources(config, hosts, (config.data.train_split, config.data.eval_split))
        train(config, directory, train_source, eval_source, override=_RESUME.value == "override")
    else:
        ModelCard.read(directory)  # refuse a workdir without a model before any data is prepared
        splits = (config.data.eval_split, *([config.data.train_split] if config.eval.precise_bn_batches else []))
        evaluate(config, directory, *_sources(config, hosts, splits))
    if processes.is_primary():
        print(f"results: {directory}/report.html and {directory}/eval, pictures: {directory}/predictions", flush=True)


if __name__ == "__main__":
    run_command(lambda: app.run(_run, flags_parser=_parse_flags), leave=processes.leave)
