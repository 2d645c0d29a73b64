"""Many clients in one process, each with a connection of its own: started by `test_cluster_load`.

    python load_clients.py URL PATH CLIENTS IN_THE_AIR READS BLOCK_BYTES

Reads blocks of the file, each of which says in every 8 bytes which one it is, and prints how many of them were right.
"""

from __future__ import annotations

import sys

import emberfs
from emberfs.client.router import RouterConfig, StorageRouter
from emberfs.cluster.credentials import find_credentials
from emberfs.cluster.store import ClusterStore, tls_files
from emberfs.errors import EmberError
from emberfs.messages import ChunksRead, ReadChunks
from emberfs.striping import chains_of
from emberfs.transport import TcpConfig, TcpNetwork
from emberfs.types import Chunks, chunk_id
from emberfs.urls import cluster_addresses

PATIENT = RouterConfig(deadline_s=240.0)
"""How slow the machine is decides nothing."""


def block(number: int, size: int) -> bytes:
    """The content of block `number`."""
    return number.to_bytes(8, "little") * (size // 8)


def main() -> None:
    url, path = sys.argv[1:3]
    clients, in_the_air, reads, size = map(int, sys.argv[3:])
    with emberfs.connect(url) as client:
        inode = client.stat(path)
        store = client._attachment.store
        assert isinstance(store, ClusterStore)
        layout = inode.layout
        assert isinstance(layout, Chunks)
        chains = chains_of(layout)
        per_chunk = layout.chunk_size_bytes // size
        config = TcpConfig(tls=tls_files(find_credentials(cluster_addresses(url))), shares_memory=False)
        networks = [TcpNetwork(store.runtime, config) for _ in range(clients)]
        right = 0

        async def read(router: StorageRouter, first: int) -> None:
            nonlocal right
            buffer = bytearray(size)
            for number in range(first, first + reads):
                number = number * 7919 % (inode.length // size)
                index, inside = divmod(number, per_chunk)
                request = ReadChunks([chains[index % len(chains)]], [chunk_id(inode.id, index)], [inside * size])
                assert await router.call(request, [memoryview(buffer)]) == ChunksRead([size])
                assert buffer == block(number, size), number
                right += 1

        async def all_clients() -> None:
            tasks = []
            for number, network in enumerate(networks):
                router = StorageRouter(store.runtime, network, store.routes, config=PATIENT)
                count = in_the_air * 20 if number == 0 else in_the_air
                tasks += [store.runtime.spawn(read(router, number * 31 + each), "reader") for each in range(count)]
            for task in tasks:
                await task
            for network in networks:
                await network.close()

        store.portal.run(all_clients())
        sys.stdout.write(f"{right}\n")


if __name__ == "__main__":
    try:
        main()
    except EmberError as error:
        sys.exit(f"{type(error).__name__}: {error}")
