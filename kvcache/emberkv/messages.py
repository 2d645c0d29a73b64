"""What clients and the service say to each other, packed into the store's `Foreign` message.

Pages travel as columns: keys 32 bytes each, places 16 bytes each, one after the other. A `seat` is what `Open` gave: a
namespace, a tenant and a writer.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from emberfs.errors import ProtocolError
from emberfs.messages import Foreign, Message
from emberfs.transport.types import RemoteCall

from . import errors
from .errors import KvError
from .namespace import Namespace

A = TypeVar("A", bound="Answer")

REPORTED_MAX = 64
"""Keys in one `Report`: of each the service reads a page."""


class Ask(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of requests. Fields are added at the end with a default."""


class Open(Ask, frozen=True):
    """Be seated at a namespace, made if it is new. -> Opened"""

    namespace: Namespace
    tenant: str
    token: str = ""
    policy: str = "write-through"
    """Of `admission.PUT_POLICIES`: which of the pages that this client puts are stored."""


class Match(Ask, frozen=True):
    """The longest usable prefix of each chain. -> Matched"""

    seat: int
    chains: list[bytes]
    lease_s: float
    grants: bool = False
    """To read under, too."""


class Lookup(Ask, frozen=True):
    """Each key for itself. -> LookedUp"""

    seat: int
    kind: int
    keys: bytes
    lease_s: float
    grants: bool = False


class Reserve(Ask, frozen=True):
    """Places for pages. -> Reserved"""

    seat: int
    kind: int
    keys: bytes
    parents: bytes
    lengths: list[int]
    durable: bool = False
    """Where nothing is to be written: what is known is durable when this is answered."""
    grant: bool = False
    """Wanted: a grant to write there."""


class Commit(Ask, frozen=True):
    """They are written. -> Committed"""

    seat: int
    reservations: list[int]
    crcs: list[list[int]]
    """Of each."""
    durable: bool
    tokens: list[bytes] = []
    """Of each reservation the tokens of its pages, uint32 little-endian, or none: for who follows KV events."""


class GiveUp(Ask, frozen=True):
    """They will not be. -> Okay"""

    seat: int
    reservation: int


class Release(Ask, frozen=True):
    """Leases end. -> Okay, with how many there were."""

    seat: int
    leases: list[int]


class Extend(Ask, frozen=True):
    """A lease goes on. -> Okay, 0 if it is over."""

    seat: int
    lease: int
    lease_s: float


class Renew(Ask, frozen=True):
    """A lease goes on, and what is read under. -> Renewed"""

    seat: int
    lease: int
    lease_s: float
    grants: list[bytes]


class Report(Ask, frozen=True):
    """A reader could not use these. -> Okay, with how many were indeed damaged."""

    seat: int
    kind: int
    keys: bytes


class Remove(Ask, frozen=True):
    """Pages go, with what hangs below them. -> Okay"""

    seat: int
    keys: bytes


class Pin(Ask, frozen=True):
    """Pages stay for so long. -> Okay"""

    seat: int
    keys: bytes
    for_s: float


class Close(Ask, frozen=True):
    """The client ends: what it reserved and has not committed will not come. -> Okay"""

    seat: int


class Flush(Ask, frozen=True):
    """What was committed is to be durable. -> Okay"""

    seat: int


class Browse(Ask, frozen=True):
    """Some of the tenant's pages, in no order that means anything. -> Browsed"""

    seat: int
    after: int
    """What the answer before said; 0: from the start."""
    count: int
    lease_s: float


class Stat(Ask, frozen=True):
    """Numbers of everything that the token may see. -> Numbers"""

    token: str = ""
    tenant: str = ""


class Erase(Ask, frozen=True):
    """All that a tenant has goes, in one namespace or ("") in all. -> Numbers"""

    tenant: str
    token: str = ""
    namespace: str = ""


class Drop(Ask, frozen=True):
    """A whole namespace goes: a revision that nobody serves any more. Operators only. -> Numbers"""

    namespace: str
    token: str = ""


class Quota(Ask, frozen=True):
    """What a tenant may hold in a namespace; 0: as much as there is. Operators only. -> Okay"""

    namespace: str
    tenant: str
    limit_bytes: int
    token: str = ""


class Ttl(Ask, frozen=True):
    """After how long pages go that nobody used: a tenant's, or ("") those of all others; 0: as without it. Operators
    only. -> Okay"""

    namespace: str
    tenant: str
    ttl_s: float
    token: str = ""


class Collect(Ask, frozen=True):
    """Give back what is dead now, and compact where it pays. Operators only. -> Numbers"""

    namespace: str
    token: str = ""


AnyAsk = (
    Open | Match | Lookup | Reserve | Commit | GiveUp | Release | Extend | Report | Remove | Pin | Close | Flush | Stat
    | Erase | Drop | Quota | Collect | Browse | Ttl | Renew
)  # fmt: skip


class Answer(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of replies."""


class Opened(Answer, frozen=True):
    seat: int
    number: int
    """Of the tenant, as page headers have it."""
    store: str
    """URL of the store that holds the pages."""
    segments: str
    """The directory of the segments."""
    wants_tokens: bool = False
    """Somebody is told the tokens of pages that are put."""


class Matched(Answer, frozen=True):
    pages: list[int]
    """Of each chain, how many."""
    reasons: list[str]
    leases: list[int]
    places: list[bytes]
    """Of each kind: the places of all pages of all chains, zeros where the kind has none."""
    known: list[int] = []
    """Of each chain, how many pages are there, if some match ended for want of states."""
    partings: list[int] = []
    """The same: how many of them it has in common with others that go on otherwise; 0: see `parting`."""
    grants: list[list[bytes]] = []
    """Of each chain."""


class LookedUp(Answer, frozen=True):
    places: bytes
    lease: int
    grants: list[bytes] = []


class Renewed(Answer, frozen=True):
    grants: list[bytes]
    """None: the lease is over."""


class Browsed(Answer, frozen=True):
    next: int
    """Go on from here; 0: that was all."""
    keys: bytes
    parents: bytes
    places: list[bytes]
    """Of each kind."""
    lease: int


class Reserved(Answer, frozen=True):
    reservation: int
    states: bytes
    """One each: see `pool.STORED` and so on."""
    places: bytes
    """Of the pages that are to be written only."""
    grant: bytes = b""
    """To write into the segments of those places."""


class Committed(Answer, frozen=True):
    gone: list[int]
    """Reservations that had run out: their pages are not there."""


class Okay(Answer, frozen=True):
    count: int = 0


class Numbers(Answer, frozen=True):
    json: str


class Failed(Answer, frozen=True):
    name: str
    """Of the class."""
    text: str


AnyAnswer = Opened | Matched | LookedUp | Reserved | Committed | Okay | Numbers | Failed | Browsed | Renewed

_encoder = msgspec.msgpack.Encoder()
_asks = msgspec.msgpack.Decoder(AnyAsk)
_answers = msgspec.msgpack.Decoder(AnyAnswer)


def encode_ask(ask: Ask) -> Foreign:
    """A request on its way."""
    return Foreign(_encoder.encode(ask))


def decode_ask(message: Foreign) -> AnyAsk:
    """Raises ProtocolError."""
    try:
        ask: AnyAsk = _asks.decode(message.body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not a request that this service knows: {error}") from error
    return ask


def encode_answer(answer: Answer) -> Foreign:
    """A reply on its way."""
    return Foreign(_encoder.encode(answer))


def encode_error(error: KvError) -> Foreign:
    """An error of ours on its way; those of the store the transport carries by itself."""
    return Foreign(_encoder.encode(Failed(type(error).__name__, str(error))))


async def send(call: RemoteCall, ask: Ask, answer: type[A], *, timeout_s: float) -> A:
    """Ask, and return the answer. Raises what the service raised, ProtocolError, Unavailable."""
    return decode_answer(await call(encode_ask(ask), timeout_s=timeout_s), ask, answer)


def decode_answer(reply: Message, ask: Ask, answer: type[A]) -> A:
    """The answer in a reply. Raises what the service raised, ProtocolError."""
    try:
        said = _answers.decode(reply.body) if isinstance(reply, Foreign) else None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"not a reply that this program knows: {error}") from error
    if isinstance(said, Failed):
        kind = getattr(errors, said.name, None)
        raise kind(said.text) if isinstance(kind, type) and issubclass(kind, KvError) else KvError(said.text)
    if not isinstance(said, answer):
        raise ProtocolError(f"{type(said).__name__} is no answer to {type(ask).__name__}")
    return said
