"""Configurations read from files by commands that need more than one, or no global flags."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from psp_jax.command import last_words
from psp_jax.config import check_fields, unknown_override


def read_config(file: str, overrides: Sequence[str]) -> ConfigDict:
    """Return the configuration in FILE or FILE:VARIANT with flags --config.FIELD=VALUE applied.

    Raises:
      FileNotFoundError, ValueError: no such file, an unknown field, a flag that is none, or an error in the file.
    """
    path = Path(file.partition(":")[0])
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}; the repository's are in configs/.")
    for argument in overrides:
        if not argument.startswith("--config.") or "=" not in argument:
            raise ValueError(f"Unexpected argument {argument}; fields are set as in --config.data.dir=DIR.")
    arguments = ["read_config", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except Exception as error:  # a configuration file is a program
        raise ValueError(parse_problem(error, file, overrides)) from error
    check_type(values.config, file)
    check_fields(values.config)
    return values.config


def check_type(config: object, file: str) -> None:
    """Raise ValueError where what a file's get_config() returned is no configuration."""
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{file}: get_config() must return psp_jax.config.defaults(), changed, not {type(config).__name__}."
        )


def parse_problem(error: Exception, file: str, arguments: Sequence[str]) -> str:
    """Say in one line why the configuration in `file` with the flags `arguments` cannot be had."""
    if problem := unknown_override(arguments):
        return problem
    if isinstance(error, flags.Error) and "Traceback" not in str(error):  # of a flag, which it names
        return last_words(error)
    kind = "" if isinstance(error, flags.Error | OSError | ValueError) else f"{type(error).__name__}: "
    words = f"{kind}{last_words(error)}"
    return words if file.partition(":")[0] in words else f"{file}: {words}"
