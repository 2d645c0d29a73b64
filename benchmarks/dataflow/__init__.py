"""What SQL jobs over partitioned data cost, beside DuckDB on the same files and beside who else distributes them.

    sort         1 GB of records, by key: as one plan sees fit, and forced through the exchange
    partition    the same into 16 parts by hash: to shuffle files on the store, to Parquet
    tpch         the 22 queries over tables in 8 parts on the store, automatic and forced
    startup      from nothing to the first result, on 8 rows
    workers      two against one, with one thread each; 4 GB sorted within 1 GiB
    skew         60 % of the rows on one key, and keys that are all NULL, against keys that are not

Every job is a process of its own, so start-up is in it on every side. CPU is that of the whole tree of processes, the
store's server and Ray's daemons too. What each side made is compared with what was to be made.

Not run here: more than one machine.
"""

from .rows import FULL, QUICK, run

__all__ = ["FULL", "QUICK", "run"]
