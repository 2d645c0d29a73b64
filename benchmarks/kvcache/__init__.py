"""What pages of KV cost: to get, to put, to look up and to keep, beside the stores that engines use for it.

    get      batches of 16 pages of 56 KiB to 4 MiB: through shared memory, and over TCP
    put      the same, stored by one writer into one replica
    crowd    8 client processes at once
    match    look-ups of prefixes, 64 a request, each with a lease
    space    bytes on disk for each live byte
    restart  1M pages: from the end of a service to a hit at the next one
    churn    bytes written for each byte put, while pages are evicted: a client reads what hits and puts what does not
    table    1M and 10M pages: memory of each, and how long a look-up among them takes
    trace    what a trace of conversations hits, simulated

The service and the storage server run in processes of their own, redis' server and Mooncake's too; LMDB and plain files
are read in this one. Every page is checked with CRC32C where it was read. Data are warm in the page cache.

Not run here: more than one machine, an engine.
"""

from .rows import FULL, QUICK, run

__all__ = ["FULL", "QUICK", "run"]
