"""Every request and reply between clients, services and servers. The embedded store speaks these too, over `memory`.

A request is a struct plus a list of buffers handed beside it: for reads the destinations (writable), for writes the
payloads. The server writes into, or reads from, memory the client handed over; payload bytes are never in the struct.

Does not know: who serves a message, or how it travels.
"""

from .base import *
from .chunks import *
from .foreign import *
from .kv import *
from .manager import *
from .names import *
from .replication import *
from .sharing import *
from .upkeep import *
