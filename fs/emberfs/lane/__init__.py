"""Lanes: reads between processes of one host that no interpreter takes part in on the server's side.

A lane is a socket pair between a thread of a client and a storage server. The client says which ranges of which chunks
should go where in memory that the server maps; the server's threads read them there from the page cache, check them,
and say which are done. What they cannot do at once, and for certain, they *decline*; the client then asks the
service, which knows what to do. So a lane adds speed and no meaning: without it every result is the same.

A server serves from a table of extents that the service keeps: an entry is put once a chunk has been read and nothing
of it is pending, and dropped before anything of it changes (`engine.extents`). A read counts only if its entry, its
chain version and the lease were still good when it was over; it then happened at the moment it was looked up.

    crc32c.c   the checksum          server.c   threads that serve lanes
    table.c    the extents           client.c   one exchange
    lane.h     the messages          module.c   all of it for Python

`server` and `client` are the two ends in Python. Where the C part was not built (no compiler, or not
Linux) there are no lanes. The slow twin of everything here is the service itself: see tests/fs/test_lanes.py.
"""

from .native import native

__all__ = ["native"]
