-- One statement a line. A line of `-- name flags` begins a group; a flag holds for all of it:
-- `ordered`: the order of the rows is part of the answer, the ORDER BY leaves no ties.
-- `unstable`: DuckDB itself may answer in more ways than one; only the number of rows and the types are sure.

-- scan
SELECT * FROM events
SELECT id, host FROM events WHERE id < 10
SELECT host FROM events WHERE host = 'müller' AND n > 0
SELECT id FROM events WHERE score > 1
SELECT id FROM events WHERE score = 'nan'::DOUBLE
SELECT id, score FROM events WHERE score = 0
SELECT id FROM events WHERE score < 'inf'::DOUBLE
SELECT id FROM events WHERE host IS NULL OR host = ''
SELECT id FROM events WHERE NOT (n = 1 OR ok)
SELECT id FROM events WHERE day BETWEEN DATE '2024-01-01' AND DATE '2024-01-03'
SELECT id FROM events WHERE day > '2024-01-01' AND seen < '2024-03-01 12:00:00'
SELECT id FROM events WHERE seen_tz >= TIMESTAMPTZ '2024-03-31 03:00:00+02'
SELECT id FROM events WHERE n IN (1, 3, NULL)
SELECT id FROM events WHERE n NOT IN (1, 3)
SELECT id FROM events WHERE kind IN ('a', 'c') AND price <> 0
SELECT id FROM events WHERE host LIKE '%l%' AND host NOT ILIKE 'Z%'
SELECT id FROM events WHERE big > 1000000000000000000000
SELECT id FROM events WHERE price > 10.5 AND ratio < 12
SELECT id FROM events WHERE n + id > 50 OR n * 2 = id
SELECT id FROM events WHERE id % 2 = 0 AND id % 3 = 0
SELECT id FROM events WHERE n = 1 AND n = 2
SELECT id FROM events WHERE FALSE
SELECT * FROM nothing
SELECT k + 1, upper(v) FROM nothing WHERE d > 1
SELECT "a b", "select", "Ünï", "x""y" FROM wide WHERE "Ünï" = 1
SELECT "x""y" AS "a b", "select" AS "x y" FROM wide
SELECT id, id, id AS id2 FROM events WHERE id = 5
SELECT 1, 'a', NULL
SELECT count(*) FROM events, hosts
FROM events SELECT id LIMIT 0
SELECT COLUMNS('^(id|n)$') FROM events WHERE id < 3
SELECT * EXCLUDE (big, seen) REPLACE (id + 1 AS id) FROM events WHERE id < 3

-- scalar
SELECT id, n + 1, -n, n / 2, n // 2, n % 2, n ** 2, ~n, n << 2, n & 1, n | 4, xor(n, 3) FROM events WHERE n >= 0
SELECT id, price * 2, price + 1, price - 0.5, price / 3, price * price, round(price, 1), -price FROM events
SELECT id, score + 1, score * 0, -score, abs(score), isnan(score), isinf(score), round(score, 1) FROM events
SELECT big + 1, big * 2, big::VARCHAR, big::DOUBLE, -big FROM events
SELECT id, CAST(n AS VARCHAR), CAST(price AS INTEGER), TRY_CAST(host AS INTEGER), CAST(id AS DECIMAL(18, 3)) FROM events
SELECT CASE WHEN n > 1 THEN 'big' WHEN n IS NULL THEN host ELSE 'small' END, CASE kind WHEN 'a' THEN 1 END FROM events
SELECT coalesce(n, 0), nullif(n, 1), ifnull(host, '?'), greatest(n, 2, id), least(host, 'm'), if(ok, 1, 2) FROM events
SELECT n IS DISTINCT FROM 1, n IS NOT DISTINCT FROM NULL, ok AND n > 1, ok OR n > 1, NOT ok, n BETWEEN 0 AND 2 FROM events
SELECT upper(host), length(host), host || '!', substr(host, 2, 2), host[1:2], left(host, 2), reverse(host) FROM events
SELECT concat(host, n, kind), concat_ws('-', host, n), format('{}:{}', host, id), printf('%05d', id) FROM events
SELECT replace(host, 'l', 'L'), split_part(host, 'l', 1), position('l' IN host), trim(host, 'm'), lpad(host, 8, '*') FROM events
SELECT regexp_matches(host, '^[a-z]+$'), regexp_extract(host, '([a-z])([a-z])', 2), regexp_replace(host, '[aeiou]', '_', 'g') FROM events
SELECT host LIKE 'm%', host LIKE '%a', host LIKE '%l%', host LIKE 'm_l%', host SIMILAR TO '.*a', host GLOB 'a*' FROM events
SELECT md5(host), sha256(host), hex(encode(host)), unicode(host), ascii(host) FROM events
SELECT day + 1, day - DATE '2024-01-01', day + INTERVAL 1 MONTH, date_trunc('month', day), last_day(day), dayname(day) FROM events
SELECT year(seen), extract(hour FROM seen), date_part('epoch', seen), date_part(['year', 'month'], seen), strftime(seen, '%Y/%m/%d') FROM events
SELECT seen - TIMESTAMP '2024-01-01', date_diff('hour', seen, TIMESTAMP '2024-06-01'), time_bucket(INTERVAL 1 DAY, seen), seen::DATE FROM events
SELECT seen_tz, seen_tz::DATE, date_trunc('day', seen_tz), seen_tz AT TIME ZONE 'Europe/Paris', extract(hour FROM seen_tz) FROM events
SELECT strptime('2024-02-03', '%Y-%m-%d'), DATE '2024-02-29', TIMESTAMP '1969-12-31 23:59:59.999999', INTERVAL '1 month -3 days'
SELECT make_date(2024, n + 1, 1), make_timestamp(id), epoch_ms(seen), to_timestamp(id) FROM events WHERE n BETWEEN 0 AND 3
SELECT 'infinity'::DATE, '-infinity'::TIMESTAMP, DATE '0044-03-15', DATE '12000-01-01', TIMESTAMP_NS '2024-01-01 00:00:00.123456789'
SELECT 'nan'::DOUBLE, '-inf'::FLOAT, -0.0::DOUBLE, 1e-300, 0.1::FLOAT, 170141183460469231731687303715884105727, -5::HUGEINT
SELECT '\xAA\x00b'::BLOB, uuid 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 12.345::DECIMAL(30, 5), -0.01, TRUE, chr(0) || 'x'
SELECT [1, NULL, 3], {'a': 1, 'b c': [2.5]}, MAP {'k': 1}, 'b'::ENUM('a', 'b'), [1, 2]::INTEGER[2], []::VARCHAR[], NULL::INTEGER[]
SELECT TIME '10:00:00.5', TIMETZ '10:00:00-03:30', TIMESTAMP_S '2024-01-01 01:02:03', TIMESTAMP_MS '2024-01-01 01:02:03.004', 1::UTINYINT
SELECT kind, kind::VARCHAR || '!', kind = 'b', kind < 'c', enum_code(kind) FROM events
SELECT host COLLATE NOCASE = 'ZOË', host COLLATE NOCASE < 'B', (host COLLATE NOACCENT) = 'Zoe' FROM events
SELECT id FROM events WHERE host COLLATE NOCASE = 'MÜLLER'
SELECT uid::VARCHAR, uid > '00000000-0000-0000-0000-000000000002', octet_length(raw), raw || 'x'::BLOB, clock + INTERVAL 1 HOUR FROM things
SELECT span, span + INTERVAL 1 DAY, un, un.num, union_tag(un), bits::VARCHAR, bits & bits, zoned FROM odd
SELECT '101'::BIT, bits FROM odd
SELECT TRY(1 // n), try_cast(price AS TINYINT) FROM events
SELECT to_json({'a': id, 'h': host}), json_extract('{"a": [1, 2]}', '$.a[1]'), '{"b": 2}'::JSON ->> 'b' FROM events WHERE id < 9
SELECT row(id, n) = row(n, id), (id, host) IN ((1, 'müller'), (2, 'x')) FROM events
SELECT hash(id), hash(host) FROM events
SELECT typeof(n), typeof(price), pi(), 7 // 2, 7 / 2, 2 ^ 3, @(-3) FROM events

-- nested
SELECT id, tags[1], tags[-1], tags[1:2], tags[:2], tags[2:], len(tags), list_contains(tags, 3) FROM things
SELECT id, list_sort(tags), list_reverse_sort(tags), list_sort(tags, 'DESC', 'NULLS FIRST'), list_distinct(words) FROM things
SELECT id, list_sum(tags), list_avg(tags), list_aggregate(words, 'string_agg', '-'), array_to_string(words, ',') FROM things
SELECT id, list_transform(tags, lambda x: x + id), list_filter(words, lambda w, i: i > 1), [w || '!' FOR w IN words IF w <> 'a'] FROM things
SELECT id, list_reduce([1, 2, 3, id], lambda p, q: p - q), list_transform([tags, [1]], lambda l: list_transform(l, lambda y: y * id)) FROM things
SELECT id, list_transform([10, 20], lambda x, i: x * i - id), list_reduce([1, 2], lambda p, q, i: p - q * i) FROM things
SELECT st.x, st.y, st.z.deep FROM things
SELECT st.x FROM things WHERE st.x > 1 AND st.z.deep < 7
SELECT st, st.y FROM things WHERE st.y <> 'y2'
SELECT {'id': id, 'st': st}, struct_insert(st, added := id), struct_pack(a := id, "b c" := words) FROM things
SELECT m['k'], map_keys(m), map_values(m), cardinality(m), MAP {id: st.y}, map_from_entries([(id, 'v')]) FROM things
SELECT arr, arr[2], array_distance(arr, [1, 2, 3]::DOUBLE[3]), array_value(id, 2), arr::DOUBLE[] FROM things
SELECT id, unnest(tags) FROM things
SELECT id, unnest(words) AS w, unnest([1, 2]) AS one_two FROM things WHERE id > 0
SELECT unnest(st) FROM things
SELECT unnest([[1, 2], [3]]) AS l
SELECT t.id, w.w FROM things t, unnest(t.words) w(w)
SELECT t.id, w.w FROM things t, (SELECT unnest(t.words) AS w) w WHERE w.w <> 'a'
SELECT flatten([tags, [id]]), list_zip(tags, words), range(id), generate_series(1, id), list_concat(tags, [9]) FROM things
SELECT list_value(id, 1), row(id, st.y), tags = [1, NULL, 2], st < {'x': 3, 'y': 'a', 'z': {'deep': 1.0}} FROM things

-- aggregate
SELECT count(*), count(n), sum(n), min(host), max(price), avg(n) FROM events
SELECT sum(price), avg(price), sum(big), min(seen), max(day), bool_and(ok), bool_or(ok), bit_xor(n) FROM events
SELECT sum(ratio), avg(ratio), stddev(ratio), var_pop(ratio), corr(ratio, id), product(ratio + 1) FROM events WHERE id < 20
SELECT count(*), sum(k), max(v), avg(d) FROM nothing
SELECT k, count(*) FROM nothing GROUP BY k
SELECT host, count(*), sum(n) FROM events GROUP BY host
SELECT score, count(*) FROM events GROUP BY score
SELECT kind, ok, count(*) AS c, sum(price) FROM events GROUP BY ALL
SELECT n % 2 AS parity, year(seen), count(*) FROM events GROUP BY 1, 2
SELECT host, sum(n) AS s FROM events GROUP BY host HAVING sum(n) > 5
SELECT host, count(DISTINCT n), sum(DISTINCT n), count(DISTINCT kind) FROM events GROUP BY host
SELECT count(DISTINCT (n, kind)), count(DISTINCT host) FROM events
SELECT kind, count(*) FILTER (WHERE n > 1), sum(n) FILTER (ok) FROM events GROUP BY kind
SELECT kind, string_agg(host, ',' ORDER BY host), list(id ORDER BY id DESC), array_agg(n ORDER BY n, id) FROM events GROUP BY kind
SELECT kind, list(DISTINCT n ORDER BY n), string_agg(DISTINCT host, '|' ORDER BY host) FROM events GROUP BY kind
SELECT first(id ORDER BY id), last(host ORDER BY id), any_value(n ORDER BY id) FROM events
SELECT kind, arg_max(id, seen), arg_min(host, seen), max_by(id, id), max(id, 3), min(n, 2) FROM events GROUP BY kind
SELECT median(n), quantile_cont(price, 0.1), quantile_disc(n, [0.25, 0.75]), mode(kind), mad(n) FROM events
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY price), quantile_disc(id, 0.3) FROM events
SELECT histogram(n), histogram(kind) FROM events
SELECT n, kind, grouping(n), grouping(n, kind), count(*) FROM events GROUP BY ROLLUP (n, kind)
SELECT n, ok, count(*), sum(price) FROM events GROUP BY CUBE (n, ok)
SELECT n % 2, ok, count(*) FROM events GROUP BY GROUPING SETS ((n % 2), (ok), ())
SELECT kind, max(host COLLATE NOCASE) FROM events GROUP BY kind
SELECT count(*) FROM (SELECT DISTINCT n, kind FROM events)
SELECT max(st), min(tags), count(DISTINCT tags) FROM things
SELECT sum(CASE WHEN ok THEN n ELSE 0 END) / nullif(count(*), 0), max(n) - min(n) FROM events
SELECT day, sum(n) * 1.0 / sum(sum(n)) OVER () FROM events GROUP BY day
SELECT bit_and(n), bit_or(n), count_if(ok), sum(ok::INTEGER), bitstring_agg(n, 0, 10) FROM events WHERE n >= 0
SELECT DISTINCT n FROM events
SELECT DISTINCT host, kind FROM events WHERE id < 30
SELECT approx_count_distinct(id) > 50, approx_quantile(id, 0.5) BETWEEN 20 AND 40 FROM events

-- join
SELECT e.id, h.country FROM events e JOIN hosts h ON e.host = h.host
SELECT e.id, h.country FROM events e LEFT JOIN hosts h ON e.host = h.host
SELECT e.id, h.host FROM events e RIGHT JOIN hosts h ON e.host = h.host
SELECT e.id, h.host, e.host FROM events e FULL JOIN hosts h USING (host)
SELECT p.a, p.b, m.c FROM pairs p JOIN more m USING (a)
SELECT * FROM pairs NATURAL JOIN more
SELECT p.*, m.* FROM pairs p LEFT JOIN more m ON p.a = m.a AND m.c > 10
SELECT p.*, m.* FROM pairs p LEFT JOIN more m ON p.a = m.a AND p.b = m.c
SELECT p.*, m.* FROM pairs p FULL JOIN more m ON p.a = m.a AND p.b + m.c > 20
SELECT p.*, m.* FROM pairs p LEFT JOIN more m ON p.a + m.a > 3 OR m.c = 10
SELECT p.*, m.* FROM pairs p JOIN more m ON p.a < m.a
SELECT p.*, m.* FROM pairs p LEFT JOIN more m ON p.a < m.a AND p.b > m.c
SELECT p.*, m.* FROM pairs p JOIN more m ON p.a IS NOT DISTINCT FROM m.a
SELECT p.*, m.* FROM pairs p JOIN more m ON p.a = m.a::DOUBLE
SELECT p.a, q.b FROM pairs p CROSS JOIN pairs q WHERE p.b > q.b
SELECT x.a, y.a, z.c FROM pairs x, pairs y, more z WHERE x.a = y.a AND y.a = z.a AND x.b > 5
SELECT e.id, h.weight, m.c FROM events e JOIN hosts h ON e.host = h.host JOIN more m ON e.n = m.a WHERE h.weight > 1
SELECT h.country, count(*), sum(e.price) FROM events e JOIN hosts h USING (host) GROUP BY h.country
SELECT e.id FROM events e JOIN nothing ON e.n = nothing.k
SELECT e.id, nothing.v FROM events e LEFT JOIN nothing ON e.n = nothing.k WHERE e.id < 5
SELECT a FROM pairs SEMI JOIN more USING (a)
SELECT a, b FROM pairs ANTI JOIN more USING (a)
SELECT e.id, t.st.y FROM events e JOIN things t ON e.id = t.st.x
SELECT a.id, b.id FROM things a JOIN things b ON a.tags = b.tags
SELECT e.score, f.id FROM events e JOIN events f ON e.score = f.score AND e.id < f.id
SELECT p.a, l.c FROM pairs p, LATERAL (SELECT c FROM more m WHERE m.a = p.a) l
SELECT p.a, p.b, l.c FROM pairs p LEFT JOIN LATERAL (SELECT max(c) AS c FROM more m WHERE m.a > p.a) l ON TRUE

-- subquery
SELECT id FROM events WHERE n IN (SELECT a FROM pairs)
SELECT id FROM events WHERE n NOT IN (SELECT a FROM pairs WHERE a IS NOT NULL)
SELECT a, b FROM pairs WHERE a NOT IN (SELECT a FROM more)
SELECT a, a IN (SELECT a FROM more), b IN (SELECT k FROM nothing) FROM pairs
SELECT a, b FROM pairs WHERE (a, b) IN (SELECT a, c FROM more)
SELECT a, b, (a, b) NOT IN (SELECT a, c FROM more WHERE c IS NOT NULL) FROM pairs
SELECT a FROM pairs p WHERE EXISTS (SELECT 1 FROM more m WHERE m.a = p.a)
SELECT a FROM pairs p WHERE NOT EXISTS (SELECT 1 FROM more m WHERE m.a = p.a AND m.c > p.b)
SELECT a, EXISTS (SELECT 1 FROM more m WHERE m.a = p.a) FROM pairs p
SELECT a, EXISTS (FROM nothing), EXISTS (FROM more) FROM pairs
SELECT a FROM pairs WHERE b > (SELECT avg(c) FROM more)
SELECT a, b, (SELECT max(c) FROM more m WHERE m.a = p.a) FROM pairs p
SELECT a, b, (SELECT count(*) FROM more m WHERE m.a = p.a) FROM pairs p
SELECT a, b, (SELECT c FROM more m WHERE m.a = p.a) FROM pairs p
SELECT a, (SELECT k FROM nothing) FROM pairs
SELECT a FROM pairs p WHERE b > ALL (SELECT c FROM more m WHERE m.a = p.a)
SELECT a, b > ANY (SELECT c FROM more), b = ANY (SELECT c FROM more WHERE c IS NOT NULL) FROM pairs
SELECT a, b <= ALL (SELECT c FROM more) FROM pairs
SELECT a, b IN (SELECT c FROM more m WHERE m.a = p.a) FROM pairs p
SELECT host, n FROM events e WHERE n = (SELECT max(n) FROM events f WHERE f.host = e.host)
SELECT p.a, (SELECT sum(c) FROM more m WHERE m.a <= p.a) + 1 FROM pairs p
SELECT a FROM pairs p WHERE b = (SELECT min(b) FROM pairs q WHERE q.a = p.a AND EXISTS (SELECT 1 FROM more m WHERE m.a = q.a))
SELECT [x.c FOR x IN (SELECT list({'c': c} ORDER BY c) FROM more)] FROM pairs LIMIT 1
WITH c AS (SELECT host, count(*) AS k FROM events GROUP BY host) SELECT * FROM c JOIN hosts USING (host)
WITH c AS (SELECT a, count(*) AS k FROM pairs GROUP BY a) SELECT x.a, y.k FROM c x JOIN c y ON x.k = y.a
WITH c AS MATERIALIZED (SELECT a, b FROM pairs WHERE b > 5) SELECT * FROM c UNION ALL SELECT b, a FROM c
WITH c AS NOT MATERIALIZED (SELECT a FROM pairs), d AS (SELECT a + 1 AS a FROM c) SELECT c.a FROM c JOIN d ON c.a = d.a
SELECT sub.h, sub.total FROM (SELECT host AS h, sum(n) AS total FROM events GROUP BY host) sub WHERE sub.total > 3

-- window
SELECT id, row_number() OVER (ORDER BY id), rank() OVER (ORDER BY n), dense_rank() OVER (PARTITION BY kind ORDER BY n DESC NULLS FIRST) FROM events
SELECT id, sum(n) OVER (PARTITION BY kind ORDER BY id), count(*) OVER (PARTITION BY host), avg(n) OVER () FROM events
SELECT id, sum(n) OVER (ORDER BY id ROWS BETWEEN 2 PRECEDING AND CURRENT ROW), max(id) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 FOLLOWING) FROM events
SELECT id, sum(n) OVER (ORDER BY id RANGE BETWEEN 3 PRECEDING AND 2 FOLLOWING), count(*) OVER (ORDER BY n DESC RANGE BETWEEN 1 PRECEDING AND CURRENT ROW) FROM events
SELECT id, count(*) OVER (ORDER BY seen RANGE BETWEEN INTERVAL 5 HOUR PRECEDING AND CURRENT ROW), min(day) OVER (ORDER BY day RANGE BETWEEN INTERVAL 1 DAY PRECEDING AND INTERVAL 1 DAY FOLLOWING) FROM events
SELECT id, count(*) OVER (ORDER BY n GROUPS BETWEEN 1 PRECEDING AND CURRENT ROW), sum(id) OVER (ORDER BY n RANGE UNBOUNDED PRECEDING EXCLUDE TIES), sum(id) OVER (ORDER BY n ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING EXCLUDE GROUP) FROM events WHERE id > 0
SELECT id, lag(n) OVER (ORDER BY id), lead(n, 2, -1) OVER (PARTITION BY kind ORDER BY id), lag(host IGNORE NULLS) OVER (ORDER BY id) FROM events
SELECT id, first_value(host) OVER (PARTITION BY kind ORDER BY id), last_value(n IGNORE NULLS) OVER (ORDER BY id), nth_value(id, 2) OVER (ORDER BY id) FROM events
SELECT id, ntile(4) OVER (ORDER BY id), percent_rank() OVER (ORDER BY n), cume_dist() OVER (PARTITION BY ok ORDER BY n) FROM events
SELECT id, count(DISTINCT n) OVER (PARTITION BY kind), sum(n) FILTER (WHERE ok) OVER (PARTITION BY kind), string_agg(host, ',' ORDER BY id) OVER (PARTITION BY ok) FROM events
SELECT id FROM events QUALIFY row_number() OVER (PARTITION BY kind ORDER BY id DESC) <= 2
SELECT host, count(*), rank() OVER (ORDER BY count(*)) FROM events GROUP BY host
SELECT id, sum(price) OVER w, min(id) OVER w FROM events WINDOW w AS (PARTITION BY host ORDER BY id)
SELECT id, median(n) OVER (PARTITION BY kind), quantile_cont(price, 0.5) OVER (ORDER BY id ROWS 3 PRECEDING) FROM events
SELECT n, rank() OVER (ORDER BY score), row_number() OVER (ORDER BY score, id) FROM events

-- set
SELECT a FROM pairs UNION SELECT a FROM more
SELECT a, b FROM pairs UNION ALL SELECT a, c FROM more
SELECT a FROM pairs INTERSECT SELECT a FROM more
SELECT a FROM pairs EXCEPT SELECT a FROM more
SELECT a FROM pairs INTERSECT ALL SELECT a FROM more
SELECT a FROM pairs EXCEPT ALL SELECT a FROM more
SELECT a FROM pairs UNION ALL BY NAME SELECT c, a FROM more
SELECT a FROM pairs UNION ALL SELECT 1.5 UNION ALL SELECT b::DOUBLE FROM pairs
SELECT * FROM (SELECT a FROM pairs UNION ALL SELECT a FROM more) WHERE a > 1
SELECT a, count(*) FROM (SELECT a FROM pairs UNION ALL SELECT a FROM more) GROUP BY a
SELECT host FROM events EXCEPT SELECT host FROM hosts
SELECT score FROM events UNION SELECT -score FROM events
(SELECT a FROM pairs EXCEPT SELECT 1) INTERSECT (SELECT a FROM more UNION SELECT 4)

-- leaf
SELECT * FROM (VALUES (1, 'a'), (2, NULL), (NULL, 'é')) v(x, y)
VALUES (1, 2.5), (2, NULL)
SELECT i * 2 FROM range(5) r(i) WHERE i > 1
SELECT * FROM generate_series(DATE '2024-01-30', DATE '2024-02-02', INTERVAL 1 DAY) g(d)
SELECT p.a, r.i FROM pairs p JOIN range(3) r(i) ON p.a = r.i
SELECT count(*) FROM range(1000)
SELECT x.a FROM (VALUES (1), (2)) x(a) JOIN pairs USING (a)

-- mixed
SELECT count(*) FROM nothing GROUP BY GROUPING SETS (())
SELECT k, count(*) FROM nothing GROUP BY GROUPING SETS ((k), ())
SELECT n, count(*) FROM events GROUP BY GROUPING SETS ((n), (n))
SELECT n, kind, count(*) FROM events GROUP BY n, ROLLUP (kind)
SELECT 1 AS one, n FROM events GROUP BY n, one
SELECT a, (SELECT count(*) FROM more m WHERE m.a = p.a AND m.c > (SELECT min(b) FROM pairs q WHERE q.a = m.a)) FROM pairs p
SELECT a FROM pairs p WHERE EXISTS (SELECT 1 FROM more m WHERE m.a = p.a AND EXISTS (SELECT 1 FROM things t WHERE t.id = m.a AND t.id < p.b))
SELECT a FROM pairs p WHERE a IN (SELECT m.a FROM more m WHERE m.c IN (SELECT b FROM pairs q WHERE q.a = p.a))
SELECT a FROM pairs p WHERE a NOT IN (SELECT m.a FROM more m WHERE m.c = p.b)
SELECT a, (SELECT a FROM more m ORDER BY c LIMIT 1) FROM pairs
SELECT a, (SELECT list(c ORDER BY c) FROM more m WHERE m.a <= p.a) FROM pairs p
SELECT p.a, x.n FROM pairs p, LATERAL (SELECT count(*) AS n FROM events e WHERE e.n = p.a) x
SELECT p.a, x.id FROM pairs p, LATERAL (SELECT id FROM events e WHERE e.n = p.a ORDER BY id DESC LIMIT 2) x
SELECT * FROM (SELECT a, b, row_number() OVER (PARTITION BY a ORDER BY b, a) AS r FROM pairs) WHERE r = 1
SELECT host, n FROM events WHERE (host, n) IN (SELECT host, max(n) FROM events GROUP BY host)
SELECT CASE WHEN a IN (SELECT a FROM more) THEN 'in' WHEN b > (SELECT avg(c) FROM more) THEN 'above' ELSE 'no' END FROM pairs
SELECT a FROM pairs WHERE (a IN (SELECT a FROM more)) = (b IN (SELECT c FROM more))
SELECT a FROM pairs WHERE a IN (SELECT a FROM more) OR b = 30
SELECT a FROM pairs WHERE NOT (a IN (SELECT a FROM more)) AND b > 0
SELECT a FROM pairs WHERE (a IN (SELECT a FROM more WHERE a IS NOT NULL)) IS NULL
SELECT max(a) FROM pairs HAVING max(a) > 100
SELECT sum(x) FROM (SELECT a AS x FROM pairs UNION ALL SELECT c FROM more UNION ALL SELECT id FROM things) u
SELECT * FROM (SELECT 1 AS x UNION ALL SELECT NULL) a FULL JOIN (SELECT 2 AS x UNION ALL SELECT NULL) b ON a.x IS NOT DISTINCT FROM b.x
SELECT count(*) FROM events a, events b WHERE a.id < 5 AND b.id BETWEEN a.id AND a.id + 2
SELECT e.id FROM events e WHERE e.host COLLATE NOCASE IN (SELECT upper(host) FROM hosts)
SELECT h.host FROM hosts h JOIN events e ON h.host COLLATE NOCASE = e.host GROUP BY 1
SELECT upper(host) COLLATE NOCASE AS h, count(*) FROM events GROUP BY h
SELECT events.* FROM events, hosts WHERE events.host = hosts.host AND hosts.country = 'DE' AND events.n > 1
SELECT (SELECT max(id) FROM events) - (SELECT min(id) FROM events)
SELECT id, n FROM events WHERE n = (SELECT 1)
SELECT first_value(id) OVER (ORDER BY id DESC) - id FROM events WHERE id < 4
SELECT sum(sum(n)) OVER (ORDER BY kind), kind FROM events GROUP BY kind
SELECT id FROM events WHERE day = DATE '2024-01-01' - 1 OR seen::DATE = '2024-02-29'
SELECT id, price::DECIMAL(10,1), price::DOUBLE, price // 2, price % 3, price > 3.333, price = 2.5::DOUBLE FROM events
SELECT sum(price * (1 - n * 0.1)), sum(price * 0.1 + 1), avg(price / 2), max(price - n) FROM events
SELECT sum(1), count(NULL), min(NULL::INTEGER), sum(NULL::DECIMAL(5,2)) FROM events
SELECT [x FOR x IN range(n)] FROM events WHERE n > 0
SELECT string_agg(host, ', ' ORDER BY n DESC NULLS LAST, id) FROM events
SELECT count(*), max(w) FROM (SELECT unnest(words) AS w FROM things)
SELECT id, t.x FROM things, unnest([id, id + 1]) AS t(x) WHERE t.x > 2
SELECT unnest(m) FROM (SELECT map_entries(m) AS m FROM things)
SELECT unnest(st, recursive := true) FROM things
SELECT greatest(day, DATE '2024-01-01'), least(seen, TIMESTAMP '2024-03-01') FROM events
SELECT date_part('dow', day), extract(epoch FROM seen_tz), strftime(seen_tz, '%H:%M'), seen_tz - TIMESTAMPTZ '2024-01-01' FROM events
SELECT INTERVAL 1 YEAR + INTERVAL 2 DAY, day + 3, seen + INTERVAL (n) DAY FROM events
SELECT id::UTINYINT + 1::UTINYINT, id::BIT, (id / 7)::DECIMAL(9,4), (id / 7)::FLOAT FROM events
SELECT NULL, NULL + 1, [NULL], {'a': NULL}, coalesce(NULL, NULL) FROM pairs
SELECT 'a' || NULL, concat('a', NULL), NULL = NULL, NULL IS NULL, NOT NULL FROM pairs
SELECT ((a)), "a" + "b" AS "sum of", a AS "SELECT" FROM pairs
SELECT * FROM pairs WHERE a = ANY ([1, 3]) OR b IN (SELECT unnest([3, 30]))
SELECT * FROM range(3) a, range(2) b
SELECT min(i), max(i) FROM range(10, 0, -3) r(i)
SELECT generate_subscripts([4, 5, 6], 1)
SELECT a, b FROM pairs ORDER BY ALL
FROM pairs UNPIVOT (v FOR k IN (a, b))
SUMMARIZE pairs
SELECT a FROM pairs GROUP BY a HAVING count(*) > (SELECT avg(a) FROM more)
SELECT a, sum(b) OVER (PARTITION BY a) / (SELECT sum(b) FROM pairs) FROM pairs
WITH a AS (SELECT 1 AS x), b AS (SELECT x + 1 AS x FROM a), c AS (SELECT x FROM a UNION ALL SELECT x FROM b) SELECT * FROM c, b
SELECT id, lag(id, -1) OVER (ORDER BY id), nth_value(id, 3) OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) FROM events
SELECT id, sum(n) OVER (ORDER BY price RANGE BETWEEN 2.5 PRECEDING AND 1 FOLLOWING) FROM events
SELECT id, count(*) OVER (ORDER BY score RANGE BETWEEN 1 PRECEDING AND 1 FOLLOWING) FROM events
SELECT id, count(*) OVER (ORDER BY id ROWS BETWEEN n PRECEDING AND CURRENT ROW) FROM events WHERE n >= 0
SELECT id, row_number() OVER () > 0 FROM events
SELECT a, b FROM pairs ORDER BY b NULLS FIRST, a NULLS FIRST LIMIT 4
SELECT a + 1 AS x FROM pairs ORDER BY x DESC NULLS LAST, b NULLS LAST LIMIT 3 OFFSET 1
SELECT x FROM (SELECT a AS x, b FROM pairs ORDER BY b LIMIT 5) ORDER BY x
SELECT 10 // x FROM (SELECT CASE WHEN a IS NULL THEN 0 ELSE a END AS x FROM pairs ORDER BY x DESC LIMIT 3)
SELECT p.a, count(*) FROM pairs p LEFT JOIN things t ON p.a = t.id WHERE p.a NOT IN (SELECT k FROM nothing WHERE EXISTS (SELECT 1 FROM more m WHERE coalesce(m.c, 1) IS DISTINCT FROM (p.a + p.a))) GROUP BY ROLLUP (p.a)
SELECT p.b, sum(0) FROM pairs p FULL JOIN more m ON p.b < m.a WHERE p.b <> ALL (SELECT k FROM nothing WHERE NOT EXISTS (SELECT 1 FROM nothing n WHERE m.c BETWEEN 1 AND 10)) GROUP BY ROLLUP (p.b)
SELECT quantile_disc(tags, 0.5), quantile_disc(tags, [0.5]), quantile_cont(id, [0.5]), approx_quantile(id, [0.5]) FROM things

-- clock
SELECT now() > TIMESTAMPTZ '2000-01-01', current_date > DATE '2000-01-01', now() = current_timestamp, today() = current_date FROM pairs
SELECT id FROM events WHERE seen < now() AND day < current_date

-- refused
WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r WHERE i < 5) SELECT * FROM r
SELECT p.a, m.c FROM pairs p ASOF JOIN more m ON p.a >= m.a
SELECT p.b, m.c FROM pairs p POSITIONAL JOIN more m
SELECT count(*) <= 60 FROM events TABLESAMPLE 10%
SELECT count(*) FROM (SELECT id FROM events LIMIT 50%)
PIVOT pairs ON a IN (1, 2) USING sum(b)
SELECT id FROM events ORDER BY id LIMIT (SELECT 3)
SELECT count(rowid) FROM events

-- order ordered
SELECT id, host FROM events ORDER BY host DESC NULLS FIRST, id
SELECT id FROM events ORDER BY score, id
SELECT id, n FROM events ORDER BY n NULLS FIRST, price DESC NULLS LAST, id DESC
SELECT host FROM events ORDER BY id LIMIT 5
SELECT id FROM events ORDER BY id DESC LIMIT 5 OFFSET 3
SELECT id FROM events ORDER BY id OFFSET 55
SELECT n + 1 AS m FROM events ORDER BY seen
SELECT host, count(*) AS c FROM events GROUP BY host ORDER BY c DESC, host
SELECT DISTINCT host FROM events ORDER BY host
SELECT DISTINCT ON (kind) kind, id, host FROM events ORDER BY kind, id DESC
SELECT a FROM pairs UNION SELECT a FROM more ORDER BY a
SELECT * FROM (SELECT id, n FROM events ORDER BY id DESC LIMIT 10) ORDER BY n NULLS LAST, id LIMIT 4
SELECT id FROM events ORDER BY host COLLATE NOCASE, id
SELECT id, st FROM things ORDER BY st DESC
SELECT tags, id FROM things ORDER BY tags NULLS FIRST, id
SELECT day, sum(n) AS s FROM events GROUP BY day ORDER BY ALL
SELECT e.id, h.weight FROM events e JOIN hosts h USING (host) ORDER BY h.weight DESC, e.id LIMIT 7
SELECT id, sum(n) OVER (ORDER BY id) AS s FROM events ORDER BY s DESC NULLS LAST, id LIMIT 6
SELECT k FROM nothing ORDER BY k LIMIT 3
SELECT id * 2 FROM (SELECT id FROM events ORDER BY id LIMIT 10 OFFSET 2) WHERE id % 2 = 0 ORDER BY 1
SELECT big FROM events ORDER BY big DESC LIMIT 2
SELECT kind, list(id ORDER BY id)[1:3] FROM events GROUP BY kind ORDER BY kind

-- unstable unstable
SELECT id, random() FROM events
SELECT uuid() FROM pairs
SELECT id FROM events LIMIT 7
SELECT kind, first(host), list(n), any_value(id) FROM events GROUP BY kind
SELECT host, string_agg(kind, ',') FROM events GROUP BY host
SELECT DISTINCT ON (kind) kind, id FROM events
SELECT id, row_number() OVER (ORDER BY kind) FROM events
SELECT DISTINCT host COLLATE NOCASE FROM (SELECT host FROM hosts UNION ALL SELECT lower(host) FROM hosts)
SELECT list(x) FROM (SELECT unnest([3,1,2]) AS x ORDER BY x)
