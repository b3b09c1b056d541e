"""Pickles as plain data: the instructions are followed, but nothing that they name is imported, made or called.

Only `pickletools.genops`, which splits the stream, is Python's own. Its unpickler, even with `find_class` overridden,
lets a file choose how much memory its memo takes and overflow the C stack by the hash of nested tuples.
"""

import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from psp_jax.weights.arrays import MAX_TENSORS, Unreadable

# About 100 MB of small objects at most; checkpoints with an optimizer have tens of thousands.
MAX_STEPS = 1_000_000
MAX_ARGUMENTS = 32  # one long list of them could be given to call after call
MAX_NAME = 1000  # characters
# What honest checkpoints name of Python itself. Anything else of it is a sign of an attack.
HARMLESS = {
    "builtins": "object list dict tuple set frozenset int float complex bool bytes bytearray str slice range getattr",
    "collections": "OrderedDict defaultdict Counter deque",
    "datetime": "datetime date time timedelta timezone",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
}
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclass(frozen=True, eq=False, slots=True)
class Named:
    """A class or function that the file names, or whatever calling it would have made: the name is all there is."""

    name: str


def read_pickle(
    stream: IO[bytes], calls: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]
) -> object:
    """Follow the instructions of one pickle and return what they build, of plain values and `Named`.

    Dicts, ordered or with a default, become dict, sets and objects become `Named`.

    Args:
      stream: stands at the first byte of the pickle, and behind its last afterwards. It must not make room for more
        than it has: a BytesIO or an mmap.
      calls: by full name, our functions that make what calling the named one would make.
      persistent: makes the value of a persistent id.

    Raises:
      Unreadable: the pickle names a function of Python itself, is too long, or has an instruction out of place.
      IndexError, KeyError, TypeError: it is damaged.
    """
    dicts = {"collections.OrderedDict": _ordered, "collections.defaultdict": _empty}
    machine = _Machine({**dicts, **calls}, persistent)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_STEPS:
            raise Unreadable(f"its pickle has more than {MAX_STEPS:,} instructions, more than weights need")
        if opcode.arg is not None and opcode.stack_after not in ([], [pickletools.anyobject]):
            machine.stack.append(argument)  # a number or a text
        elif opcode.name != "STOP":
            machine.step(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    """The unpickler's stack, memo and instructions."""

    def __init__(self, calls: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}
        self.given = 0  # items in the arguments of all calls so far

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction. Containers of another class than list and dict take their items and forget them."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Named("builtins.set"))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self.take(int(name[-1])))
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self.marked()
                self.stack.append(_container(name, items))
            case "APPEND" | "SETITEM":
                items = list(self.take(1 if name == "APPEND" else 2))
                _extend(stack[-1], items)
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items = self.marked()
                _extend(self.stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "DUP":
                stack.append(stack[-1])
            case "POP":
                _ = stack.pop() if stack else self.marked()
            case "POP_MARK":
                self.marked()
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case _:
                self.object_step(name, argument)

    def object_step(self, name: str, argument: Any) -> None:
        """Follow an instruction that names, makes or fills an object: its name is all that is kept of it."""
        match name:
            case "GLOBAL":
                self.stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_named(*self.take(2)))
            case "REDUCE" | "NEWOBJ":
                self.stack.append(self.call(*self.take(2)))
            case "NEWOBJ_EX":
                maker, arguments, _ = self.take(3)
                self.stack.append(self.call(maker, arguments))
            case "OBJ":
                maker, *arguments = self.marked()
                self.stack.append(self.call(maker, arguments))
            case "INST":
                arguments = self.marked()
                self.stack.append(self.call(_named(*argument.split(" ", 1)), arguments))
            case "BUILD":
                self.stack.pop()  # attributes: of an OrderedDict the version numbers, otherwise of what is not kept
            case _:
                raise Unreadable(f"its pickle has the instruction {name}, which weights do not need")

    def take(self, count: int) -> tuple[Any, ...]:
        """Take the last `count` values from the stack."""
        if count > len(self.stack):
            raise Unreadable("its pickle takes a value that is not there")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def call(self, maker: Any, arguments: Any) -> object:
        """Return what `calls` has for `maker`, or else its name."""
        if not isinstance(maker, Named):
            raise Unreadable(f"its pickle calls a value of the type {type(maker).__name__}")
        if maker.name not in self.calls:
            return maker
        if not isinstance(arguments, list | tuple) or len(arguments) > MAX_ARGUMENTS:
            raise Unreadable(f"its pickle calls {maker.name!r} with other arguments than it takes")
        self.given += sum(len(argument) for argument in arguments if isinstance(argument, list | tuple))
        if self.given > MAX_TENSORS:
            raise Unreadable(f"its pickle calls {maker.name!r} with more items than weights need")
        return self.calls[maker.name](*arguments)


def _named(module: Any, name: Any) -> Named:
    """Return the name; Unreadable where it is of Python itself and not known as harmless."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise Unreadable("its pickle names something by other values than texts")
    if len(module) + len(name) > MAX_NAME:
        raise Unreadable(f"its pickle names {module[:80]!r}, a name that is too long")
    module = PYTHON2.get(module, module)
    full = f"{module}.{name}"
    if module.split(".")[0] in sys.stdlib_module_names and name not in HARMLESS.get(module, "").split():
        raise Unreadable(f"its pickle names {full[:80]!r}, which weights do not need and which was not run")
    return Named(full)


def _container(name: str, items: list[Any]) -> object:
    if name == "DICT":
        made: dict[Any, Any] = {}
        _extend(made, items)
        return made
    return {"LIST": list, "TUPLE": tuple}[name](items) if name != "FROZENSET" else Named("builtins.frozenset")


def _extend(container: object, items: list[Any]) -> None:
    """Add items to a list, or keys and values in turn to a dict."""
    if isinstance(container, list):
        container.extend(items)
    elif isinstance(container, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of other keys may nest deeply, or be one for all of them; no weights are under them.
            plain = isinstance(key, str | None) or (isinstance(key, int) and key.bit_length() <= 60)
            container[key if plain else Named("key")] = value


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Unreadable("its pickle makes a dict of something else than pairs")
        _extend(made, list(pair))
    return made


def _empty(*_: Any) -> dict[Any, Any]:
    return {}
