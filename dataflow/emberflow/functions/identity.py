"""What a function means, as a digest: the key that the step cache finds its results by.

Equal digests mean equal functions; a function may well get another digest though it means the same, which costs a
computation and nothing else. So: bytecode with constants and names (of one minor version of Python; no line numbers, no
file names), defaults, closure, the values of the globals it uses, through functions and classes of the user's own. A
thing of an installed package is its name and the package's version. Neither hash() nor id() comes into a digest.

What cannot be seen through (open files, locks, generators) has no digest but a reason, and whoever asked warns and does
not cache. What a function reaches only by computed names (`getattr(module, name)`, `globals()[name]`), or by reading
files and the environment, is not seen; an explicit version is for those.

Does not know: the cache, plans.
"""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .modules import is_installed, version
from .shipping import captured

_SCHEME = b"emberflow function 1"
_DIGEST_BYTES = 16

_PLACE = frozenset({"__module__", "__qualname__", "__firstlineno__", "__doc__"})
_MACHINERY = frozenset({"__dict__", "__weakref__", "__static_attributes__", "_abc_impl"})
"""What a class has that says nothing of what it does, or is made from the rest."""

_ACYCLIC = (tuple, frozenset, types.CodeType)
"""What cannot come back to itself without passing through something else that can."""
_HEAP_TYPE = 1 << 9
"""In a class's flags: it was made by Python code. The others are of the interpreter or an extension."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The digest in hex, or why there is none."""

    digest: str | None
    reason: str | None = None


class _Opaque(Exception):
    """Something whose value cannot be told. The message is the way to it and what it is."""


def identity(fn: Callable[..., Any], *, version: str | None = None) -> str | None:
    """The digest of a function's meaning, or None if it has none that lasts."""
    return identity_of(fn, version=version).digest


def identity_of(fn: Callable[..., Any], *, version: str | None = None) -> Identity:
    """The digest of a function's meaning, or the reason why it has none. A `version` is taken for the meaning, beside
    the function's name, and nothing is looked into."""
    try:
        if version is not None:
            meaning = _leaf("version", f"{getattr(fn, '__qualname__', '')} {version}".encode())
        else:
            meaning = _Reader().digest(fn)
    except _Opaque as opaque:
        return Identity(None, str(opaque))
    except RecursionError:
        return Identity(None, "it refers to data that are nested too deep")
    minor = f"python {sys.version_info[0]}.{sys.version_info[1]}".encode()
    return Identity(_node("function", _leaf("scheme", _SCHEME), _leaf("python", minor), meaning).hex())


def _leaf(tag: str, data: bytes | memoryview) -> bytes:
    """The digest of a thing without parts."""
    hasher = hashlib.blake2b(f"{tag}\0".encode(), digest_size=_DIGEST_BYTES)
    hasher.update(data)
    return hasher.digest()


def _node(tag: str, *parts: bytes) -> bytes:
    """The digest of a thing from its parts' digests, which all have one length."""
    return _leaf(tag, b"".join(parts))


class _Reader:
    """Digests of one function and of everything it refers to. Used once: objects are known by their address.

    What refers to something above itself gets that one's ordinal number, in the order of first visits. Only what can
    be part of a cycle is counted: whether two equal constants are one object differs between a module compiled and the
    same module loaded.
    """

    def __init__(self) -> None:
        self._done: dict[int, bytes] = {}
        self._open: dict[int, int] = {}
        self._visits = 0
        # An address is an object's only as long as the object lives.
        self._alive: list[Any] = []

    def digest(self, value: Any) -> bytes:
        if (leaf := _atom(value)) is not None:
            return leaf
        if type(value) in _ACYCLIC:
            return self._constant(value)
        if isinstance(value, types.ModuleType):
            return self._module(value, None)
        address = id(value)
        if (known := self._done.get(address)) is not None:
            return known
        if (ordinal := self._open.get(address)) is not None:
            return _leaf("cycle", str(ordinal).encode())
        self._alive.append(value)
        self._open[address] = self._visits
        self._visits += 1
        found = self._compound(value)
        del self._open[address]
        self._done[address] = found
        return found

    def _constant(self, value: Any) -> bytes:
        if isinstance(value, frozenset):
            return _node("frozenset", *sorted(self.digest(item) for item in value))
        return self._code(value) if isinstance(value, types.CodeType) else self._sequence("tuple", value)

    def _compound(self, value: Any) -> bytes:
        match value:
            case list() if type(value) is list:
                return self._sequence("list", value)
            case set() if type(value) is set:
                return _node("set", *sorted(self.digest(item) for item in value))
            case dict() if type(value) is dict:
                return self._mapping("dict", value)
            case types.MappingProxyType():
                return self._mapping("mappingproxy", value)
            case types.FunctionType():
                return self._function(value)
            case types.MethodType():
                return _node("method", self.digest(value.__func__), self.digest(value.__self__))
            case types.BuiltinFunctionType() if not isinstance(value.__self__, types.ModuleType | None):
                return _node("builtin method", self.digest(value.__self__), self.digest(value.__name__))
            case types.BuiltinFunctionType():
                return _named(value.__module__ or "builtins", value.__qualname__)
            case type():
                return self._class(value)
            case functools._lru_cache_wrapper():
                return _node("cached", self.digest(value.__wrapped__))
            case pa.Table() | pa.RecordBatch() | pa.ChunkedArray() | pa.Array():
                return _arrow(value)
            case _ if dataclasses.is_dataclass(value):
                # Not by pickle's hooks, which may be about travelling only (ours are).
                return _node("dataclass", self.digest(type(value)), self.digest(object.__getstate__(value)))
            case _:
                return self._object(value)

    def _sequence(self, tag: str, values: Iterable[Any]) -> bytes:
        return _node(tag, *[self.digest(value) for value in values])

    def _mapping(self, tag: str, mapping: Mapping[Any, Any]) -> bytes:
        # In its own order: iterating over it is part of what it does.
        return _node(tag, *[self.digest(part) for item in mapping.items() for part in item])

    def _code(self, code: types.CodeType) -> bytes:
        arguments = code.co_argcount + code.co_kwonlyargcount
        arguments += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
        shape = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
        names = (code.co_names, code.co_varnames[:arguments], code.co_freevars, code.co_cellvars)
        table = code.co_exceptiontable
        return self._sequence("code", (code.co_code, shape, names, code.co_consts, table))

    def _function(self, function: types.FunctionType) -> bytes:
        if _is_installed_name(function):
            return _named(function.__module__, function.__qualname__)
        attributes = frozenset(_attribute_names(function.__code__))
        parts = [self.digest(function.__code__), self.digest(function.__dict__)]
        package = function.__globals__.get("__package__") or ""
        for name, value in (*captured(function), *_imported(function.__code__, package)):
            try:
                seen = self._module(value, attributes) if isinstance(value, types.ModuleType) else self.digest(value)
            except _Opaque as opaque:
                raise _Opaque(f"{function.__qualname__} uses {name!r}: {opaque}") from None
            parts += [self.digest(name), seen]
        return _node("function", *parts)

    def _module(self, module: types.ModuleType, attributes: frozenset[str] | None) -> bytes:
        """A module that is referred to: an installed one by its version, the user's own by those of its `attributes`
        that there are."""
        if is_installed(module):
            return _named(module.__name__, "")
        if attributes is None:
            raise _Opaque(f"the module {module.__name__}, as a value: what of it is used cannot be told")
        address = id(module)
        if (ordinal := self._open.get(address)) is not None:
            return _leaf("cycle", str(ordinal).encode())
        self._open[address] = self._visits
        self._visits += 1
        parts = [self.digest(module.__name__)]
        for name in sorted(attributes & vars(module).keys()):
            value = vars(module)[name]
            seen = self._module(value, attributes) if isinstance(value, types.ModuleType) else self.digest(value)
            parts += [self.digest(name), seen]
        del self._open[address]
        return _node("module", *parts)

    def _class(self, cls: type) -> bytes:
        if _is_installed_name(cls) or not cls.__flags__ & _HEAP_TYPE:
            return _named(cls.__module__, cls.__qualname__)
        parts = [self.digest(cls.__qualname__), self.digest(type(cls)), self._sequence("bases", cls.__bases__)]
        for name in sorted(vars(cls).keys() - _PLACE - _MACHINERY):
            try:
                parts += [self.digest(name), self._member(vars(cls)[name])]
            except _Opaque as opaque:
                raise _Opaque(f"{cls.__qualname__}.{name}: {opaque}") from None
        return _node("class", *parts)

    def _member(self, member: Any) -> bytes:
        match member:
            case staticmethod() | classmethod():
                return _node(type(member).__name__, self.digest(member.__func__))
            case property():
                return self._sequence("property", (member.fget, member.fset, member.fdel))
            case functools.cached_property():
                return _node("cached_property", self.digest(member.func))
            case types.MemberDescriptorType() | types.GetSetDescriptorType():
                return _leaf("slot", member.__name__.encode())
            case _:
                return self.digest(member)

    def _object(self, value: Any) -> bytes:
        """Anything else: what pickle would make of it, part by part."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:
            raise _Opaque(f"a {_type_name(value)} ({error})") from None
        if isinstance(reduced, str):
            return _named(type(value).__module__, reduced)
        call, arguments, *rest = reduced
        state, items, pairs = [*rest, None, None, None][:3]
        # Items come as iterators.
        parts = (call, arguments, state, list(items or ()), list(pairs or ()))
        return self._sequence("object", parts)


def _atom(value: Any) -> bytes | None:
    """The digest of a plain value; None for anything with parts."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented or kind in (bool, int, range):
        return _leaf(kind.__name__, repr(value).encode())
    if kind is str:
        return _leaf("str", value.encode("utf-8", "surrogatepass"))
    if kind in (bytes, bytearray):
        return _leaf(kind.__name__, bytes(value))
    if kind is float:
        return _leaf("float", struct.pack("<d", value))
    if kind is complex:
        return _leaf("complex", struct.pack("<dd", value.real, value.imag))
    return None


def _named(module: str, name: str) -> bytes:
    """A thing that its name and its package's version say everything about."""
    found = version(module)
    if found is None:
        raise _Opaque(f"{module}.{name}".rstrip(".") + " is of a package without a version")
    return _leaf("named", "\0".join((module, name, found)).encode())


def _is_installed_name(thing: Any) -> bool:
    """Whether an installed module has this very function or class under its name."""
    module = sys.modules.get(thing.__module__ or "")
    if module is None or not is_installed(module):
        return False
    found: Any = module
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def _attribute_names(code: types.CodeType) -> set[str]:
    """Every name that a code object, or one nested in it, may look up as an attribute."""
    nested = [_attribute_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)


def _imported(code: types.CodeType, package: str) -> Iterator[tuple[str, types.ModuleType]]:
    """The modules that a code object, or one nested in it, imports. An installed one need not be loaded."""
    operations = list(dis.get_instructions(code))
    for position, operation in enumerate(operations):
        if operation.opname != "IMPORT_NAME":
            continue
        level = operations[position - 2].argval
        name = importlib.util.resolve_name("." * level + operation.argval, package)
        top = name.partition(".")[0]
        for wanted in (name, top):
            if wanted in sys.modules:
                yield wanted, sys.modules[wanted]
            else:
                spec = importlib.util.find_spec(top)
                stand_in = types.ModuleType(top)
                stand_in.__file__ = spec.origin if spec is not None else None
                if not is_installed(stand_in):
                    raise _Opaque(f"it imports {wanted!r}, which is not loaded yet; import it at the top of the file")
                yield wanted, stand_in
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imported(constant, package)


def _arrow(value: Any) -> bytes:
    """Arrow data as one stream of their schema and values, however they are cut into chunks."""
    if isinstance(value, pa.Array | pa.ChunkedArray):
        value = pa.table({"": value})
    table = value if isinstance(value, pa.Table) else pa.Table.from_batches([value])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return _leaf("arrow", memoryview(sink.getvalue()))


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
