"""Lanes: reads that no interpreter takes part in on the server's side.

A lane is a socket between a thread of a client and a storage server. The client says which ranges of which chunks it
wants, and where in memory that a server of its host maps; the server's threads read them there from the page cache,
check them, and say which are done. To other machines the bytes go over TCP, and are checked there. What a thread cannot
do at once, and for certain, it *declines*; the client then asks the service, which knows what to do. So a lane adds
speed and no meaning: without it every result is the same.

A server serves from a table of extents that the service keeps: an entry is put once a chunk has been read and nothing
of it is pending, and dropped before anything of it changes (`engine.extents`). A read counts only if its entry, its
chain version and the lease were still good when it was over; it then happened at the moment it was looked up.

    crc32c.c   the checksum          server.c   threads that serve lanes
    table.c    the extents           stream.c   lanes over TCP, both ends
    lane.h     the messages          client.c   one exchange
    read.c     reads of open files   words.c    where a word stands in what was read
    module.c   all of it for Python

`server` and `client` are the two ends in Python. An embedded store has the table, and reads by it without a lane:
`inline`. Where the C part was not built (no compiler, or not
Linux) there are no lanes. The slow twin of everything here is the service itself: see tests/e2e/test_lanes.py.
"""

from .native import native

__all__ = ["native"]
