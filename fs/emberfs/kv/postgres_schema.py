"""The tables and the one function of a store in PostgreSQL, and the statements that use them.

    emberfs_rows      the rows, and the version that wrote each
    emberfs_cleared   intervals of keys that were deleted lately, single keys too: a deletion leaves no row to look at
    emberfs_head      one row: the newest version, and how far back `emberfs_cleared` reaches
    emberfs_clients   the last flight of each client and what came of it

Everything is found through an index, so connections run with `enable_seqscan = off`: a plan made while a table was
small stays right when it has grown.

Does not know: connections.
"""

from __future__ import annotations

from .types import TRANSACTION_TIME_MAX_S

FORMAT = 1
SETUP_LOCK = 0x656D626572
"""Of `pg_advisory_xact_lock`: several servers may find the database empty at once."""

SETTINGS = {
    "default_transaction_isolation": "read committed",
    "enable_seqscan": "off",
    "jit": "off",
    "synchronous_commit": "on",
}

TABLES = f"""
CREATE TABLE emberfs_rows (
    key bytea PRIMARY KEY,
    value bytea NOT NULL,
    version bigint NOT NULL
) WITH (fillfactor = 85);
CREATE TABLE emberfs_cleared (
    version bigint NOT NULL,
    first bytea NOT NULL,
    past bytea NOT NULL
);
CREATE INDEX emberfs_cleared_version ON emberfs_cleared (version);
CREATE TABLE emberfs_clients (
    client bytea PRIMARY KEY,
    number bigint NOT NULL,
    refused int[] NOT NULL,
    seen timestamptz NOT NULL
);
CREATE TABLE emberfs_head (
    one boolean PRIMARY KEY CHECK (one),
    format int NOT NULL,
    version bigint NOT NULL,
    forgotten bigint NOT NULL,
    mark bigint NOT NULL,
    marked_at timestamptz NOT NULL
) WITH (fillfactor = 50);
INSERT INTO emberfs_head VALUES (true, {FORMAT}, 0, 0, 0, clock_timestamp());
"""

INTEGERS = """
CREATE FUNCTION emberfs_int(row_value bytea) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(sum(get_byte(row_value, i)::bigint << (8 * i)), 0)::bigint FROM generate_series(0, 7) i
$$;
CREATE FUNCTION emberfs_row(number bigint) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT string_agg(substr(int8send(number), i, 1), ''::bytea ORDER BY i DESC) FROM generate_series(1, 8) i
$$;
"""
"""The row format of `add` and `max`: little-endian signed 64-bit; no row is 0."""

COMMIT_FUNCTION = f"""
CREATE FUNCTION emberfs_commit(
    p_client bytea, p_number bigint, p_versions bigint[],
    key_ends int[], keys bytea[],
    span_ends int[], span_firsts bytea[], span_pasts bytea[],
    clear_ends int[], clear_firsts bytea[], clear_pasts bytea[],
    gone_ends int[], gone_keys bytea[],
    row_ends int[], row_keys bytea[], row_values bytea[],
    step_ends int[], step_keys bytea[], step_is_max bool[], step_numbers bigint[]
) RETURNS int[] LANGUAGE plpgsql AS $$
DECLARE
    head emberfs_head;
    known emberfs_clients;
    refused int[] := '{{}}';
    base bigint;
    its_keys bytea[];
    its_firsts bytea[];
    its_pasts bytea[];
BEGIN
    -- Holds everybody else back until this has committed. Each statement below sees all that committed before.
    UPDATE emberfs_head SET version = version + 1 WHERE one RETURNING * INTO head;
    SELECT * INTO known FROM emberfs_clients c WHERE c.client = p_client;
    IF FOUND AND known.number >= p_number THEN
        RETURN CASE WHEN known.number = p_number THEN known.refused END;
    END IF;
    FOR b IN 1 .. cardinality(p_versions) LOOP
        base := p_versions[b];
        IF base IS NOT NULL THEN
            its_keys := keys[key_ends[b] + 1 : key_ends[b + 1]];
            its_firsts := span_firsts[span_ends[b] + 1 : span_ends[b + 1]];
            its_pasts := span_pasts[span_ends[b] + 1 : span_ends[b + 1]];
            IF base < head.forgotten OR base > head.version
                OR EXISTS (SELECT FROM emberfs_rows r WHERE r.key = ANY (its_keys) AND r.version > base)
                OR EXISTS (SELECT FROM unnest(its_firsts, its_pasts) s (first, past), emberfs_rows r
                           WHERE r.key >= s.first AND r.key < s.past AND r.version > base)
                OR EXISTS (SELECT FROM emberfs_cleared c WHERE c.version > base AND (
                           EXISTS (SELECT FROM unnest(its_keys) k WHERE k >= c.first AND k < c.past)
                           OR EXISTS (SELECT FROM unnest(its_firsts, its_pasts) s (first, past)
                                      WHERE c.first < s.past AND s.first < c.past)))
            THEN
                refused := refused || b;
                CONTINUE;
            END IF;
        END IF;
        IF clear_ends[b] < clear_ends[b + 1] THEN
            FOR i IN clear_ends[b] + 1 .. clear_ends[b + 1] LOOP
                DELETE FROM emberfs_rows r WHERE r.key >= clear_firsts[i] AND r.key < clear_pasts[i];
                INSERT INTO emberfs_cleared VALUES (head.version, clear_firsts[i], clear_pasts[i]);
            END LOOP;
        END IF;
        IF gone_ends[b] < gone_ends[b + 1] THEN
            its_keys := gone_keys[gone_ends[b] + 1 : gone_ends[b + 1]];
            DELETE FROM emberfs_rows r WHERE r.key = ANY (its_keys);
            INSERT INTO emberfs_cleared SELECT head.version, k, k || '\\x00'::bytea FROM unnest(its_keys) k;
        END IF;
        IF row_ends[b] < row_ends[b + 1] THEN
            INSERT INTO emberfs_rows AS r SELECT k, v, head.version FROM unnest(
                row_keys[row_ends[b] + 1 : row_ends[b + 1]], row_values[row_ends[b] + 1 : row_ends[b + 1]]) new (k, v)
            ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version;
        END IF;
        FOR i IN step_ends[b] + 1 .. step_ends[b + 1] LOOP
            INSERT INTO emberfs_rows AS r VALUES (step_keys[i], emberfs_row(
                CASE WHEN step_is_max[i] THEN greatest(0, step_numbers[i]) ELSE step_numbers[i] END), head.version)
            ON CONFLICT (key) DO UPDATE SET version = excluded.version, value = emberfs_row(
                CASE WHEN step_is_max[i] THEN greatest(emberfs_int(r.value), step_numbers[i])
                     ELSE emberfs_int(r.value) + step_numbers[i] END);
        END LOOP;
    END LOOP;
    INSERT INTO emberfs_clients AS c VALUES (p_client, p_number, refused, clock_timestamp())
    ON CONFLICT (client) DO UPDATE SET number = excluded.number, refused = excluded.refused, seen = excluded.seen;
    -- What was cleared up to the last mark is older than any transaction may be.
    IF head.marked_at < clock_timestamp() - interval '{TRANSACTION_TIME_MAX_S:g} seconds' THEN
        DELETE FROM emberfs_cleared c WHERE c.version <= head.mark;
        DELETE FROM emberfs_clients c WHERE c.seen < clock_timestamp() - interval '1 day';
        UPDATE emberfs_head SET forgotten = mark, mark = version, marked_at = clock_timestamp() WHERE one;
    END IF;
    RETURN refused;
END
$$;
"""
"""Applies the batches of one flight in order, and returns the numbers (from 1) of those that lost a race.

Batch `b` has the items from `..._ends[b]` (exclusive, from 1) to `..._ends[b + 1]` of each list. `p_versions[b]` is
what it read at, NULL if nothing. A flight that this client sent before gets the answer of then.
"""

GET = """
SELECT h.version, $2::bigint IS NOT NULL AND (h.forgotten > $2 OR h.version < $2 OR EXISTS (
        SELECT FROM emberfs_cleared c, unnest($1::bytea[]) k WHERE c.version > $2 AND k >= c.first AND k < c.past)),
    r.key, r.value, r.version
FROM emberfs_head h LEFT JOIN emberfs_rows r ON r.key = ANY ($1::bytea[]) WHERE h.one
"""

SCAN = """
SELECT h.version, $4::bigint IS NOT NULL AND (h.forgotten > $4 OR h.version < $4 OR EXISTS (
        SELECT FROM emberfs_cleared c WHERE c.version > $4 AND c.first < $2 AND $1 < c.past)),
    r.key, r.value, r.version
FROM emberfs_head h LEFT JOIN LATERAL (
    SELECT * FROM emberfs_rows WHERE key >= $1::bytea AND key < $2::bytea ORDER BY key LIMIT $3::int
) r ON true WHERE h.one ORDER BY r.key
"""
SCAN_BACKWARDS = SCAN.replace("ORDER BY key", "ORDER BY key DESC").replace("ORDER BY r.key", "ORDER BY r.key DESC")

COMMIT = f"SELECT emberfs_commit({', '.join(f'${number}' for number in range(1, 21))})"
FORGET = "DELETE FROM emberfs_clients WHERE client = $1"
