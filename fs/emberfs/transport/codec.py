"""Messages and errors as bytes: msgpack, each message tagged with its class name.

Invariants:
  - What is decoded is one of our message classes with fields of the right types, or `ProtocolError` was raised.
  - An error arrives as the class it was raised as, with what it carried. Of a class that the receiver does not know it
    keeps the text. An error nobody raised on purpose stays in the server's log: its text may name anything.

Does not know: frames, buffers, connections.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .. import errors, messages
from ..errors import EmberError, ProtocolError
from ..messages import Message, Once

log = logging.getLogger("emberline.transport")

_encoder = msgspec.msgpack.Encoder()


class Failure(msgspec.Struct, array_like=True):
    """An error on the wire."""

    name: str
    """Of the class, or of the function in `errors` that makes one."""
    args: list[Any]
    text: str
    """For a receiver that does not know `name`."""


def encode_message(message: Message) -> bytes:
    """Opposite of `decode_message`."""
    return _encoder.encode(message)


def decode_message(body: memoryview) -> Message:
    """Raises ProtocolError."""
    try:
        return _decoder().decode(body)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not a message that this program knows: {error}") from error


def kind_of(request: Message) -> str:
    """The name that a request is counted under; of a `Once` it is that of the request inside."""
    kind = type(request)
    if kind is not Once:
        return kind.__name__
    body: bytes = request.request  # type: ignore[attr-defined]  # mypy does not see that it is a Once.
    # A msgpack array (one byte, or three for more than 15 fields) that begins with a short string: the class name.
    begin = 3 if body[:1] == b"\xdc" else 1
    length = body[begin] & 0x1F if len(body) > begin else 0
    return body[begin + 1 : begin + 1 + length].decode("ascii", "replace")


def message_classes() -> list[type[Message]]:
    """Every request and reply of `messages`, by name."""
    known = {each.__name__: each for each in _subclasses(Message) if each.__module__.startswith(messages.__name__)}
    return [known[name] for name in sorted(known)]


def encode_failure(error: Exception, request: Message) -> bytes:
    """Opposite of `decode_failure`."""
    if isinstance(error, EmberError):
        failure = Failure(_recipe(error)[0].__name__, list(_recipe(error)[1]), str(error))
    elif isinstance(error, OSError):
        failure = Failure("OSError", list(_recipe(error)[1]), str(error))
    elif isinstance(error, ValueError):
        failure = Failure("ValueError", [str(error)], str(error))
    else:
        log.error("%s failed", type(request).__name__, exc_info=error)
        text = f"internal error ({type(error).__name__}): see the server's log"
        failure = Failure("EmberError", [text], text)
    try:
        return _encoder.encode(failure)
    except (TypeError, OverflowError):  # It carries something that does not travel.
        return _encoder.encode(Failure(failure.name, [failure.text], failure.text))


def decode_failure(body: memoryview) -> Exception:
    """The error, to be raised by the caller. Raises ProtocolError if it is none."""
    try:
        failure = _failure_decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not an error that this program knows: {error}") from error
    factory = _FACTORIES.get(failure.name)
    if factory is None:
        return EmberError(failure.text)
    try:
        return factory(*failure.args)
    except TypeError:  # A newer program's class takes something more.
        return EmberError(failure.text)


def _recipe(error: Exception) -> tuple[Any, ...]:
    """(what makes the error anew, its arguments): as pickle has it."""
    recipe = error.__reduce__()
    assert isinstance(recipe, tuple)
    return recipe


_failure_decoder = msgspec.msgpack.Decoder(Failure)

_FACTORIES: dict[str, Callable[..., Exception]] = {
    "OSError": OSError,
    "ValueError": ValueError,
    **{name: made for name, made in vars(errors).items() if getattr(made, "__module__", None) == errors.__name__},
}
"""Nothing else is ever called for a peer: the classes and functions of `errors`, which only make an error."""


@functools.cache
def _decoder() -> msgspec.msgpack.Decoder[Any]:
    """Made at first use, when every module of messages has been imported."""
    return msgspec.msgpack.Decoder(functools.reduce(operator.or_, message_classes()))


def _subclasses(base: type[Message]) -> Iterator[type[Message]]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)
