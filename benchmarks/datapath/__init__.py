"""How fast bytes come from, and go to, storage servers in processes of their own on this host.

    shm      a client that hands its memory over; into `client.buffer`, and into any memory
    tcp      the same cluster's bytes over loopback TCP, without TLS; and with TLS, for information
    write    three replicas on three servers, durable
    crowd    32 clients at once; 1, 2 and 4 clients, of 1 and of 4 servers

Data are warm in the page cache. Every byte is checked with CRC32C on its way: of ours by the server (shm) or the client
(tcp), redis' and Mooncake's by their client. `s (cpu)` is the wall time of a pass and the CPU seconds of this process
and of the servers; `cpu/GiB` is both per GiB moved.

Not run here: machines apart from each other, RDMA (`ucx` is a benchmark of its own).
"""

from .rows import FULL, QUICK, run

__all__ = ["FULL", "QUICK", "run"]
