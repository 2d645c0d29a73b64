"""Scans, from DuckDB's JSON to our plan: a scan with its filters, its struct members and its dropped columns.

Filters that only help (`OPTIONAL_FILTER`) are dropped; all others are conditions of ours.
"""

from __future__ import annotations

from ..query import literal
from .expressions import COMPARISONS, ExpressionReader, Scope, comparison, conjunction, text
from .fields import Fields, Json, NotPlannable
from .nodes import Column, Expr, Filter, Fixed, Node, Project, Scan, Unnest, column

_NONE = 2**64 - 1
# The row's number: what DuckDB reads when a query needs only the number of rows. No expression may refer to it.
_ROWID = 2**64 - 1
_NO_COLUMN = Column("rowid", "ROWID")


class ScanReader:
    def __init__(self, expressions: ExpressionReader) -> None:
        self._expressions = expressions
        self._types = expressions.types

    def read(self, fields: Fields) -> Node:
        name = self._expressions.function_name(fields)
        returned = [
            Column(name, self._types.type(type_))
            for name, type_ in zip(fields.take("names"), fields.take("returned_types"), strict=True)
        ]
        if name == "seq_scan":
            data = Fields(fields.take("function_data"), "a scan")
            table = data.take("table")
            data.expect("is_index_scan", False)
            data.expect("is_create_index", False)
            data.expect("result_ids", [])
            data.ignore("catalog", "schema", "qualified_name")
            data.done()
            self._expect_plain(fields)
            node = self._columns(table, returned, fields.take("column_indexes"))
        elif name in ("range", "generate_series"):
            node = self._range(name, returned, fields)
        else:
            raise NotPlannable(f"the table function {name}")
        return self._kept(self._filtered(node, fields), fields)

    def _expect_plain(self, fields: Fields) -> None:
        """Nothing but what was read elsewhere."""
        for name in ("parameters", "input_table_types", "input_table_names", "named_arguments", "projected_input"):
            fields.expect(name, [])
        fields.expect("named_parameters", [], {})
        fields.expect("original_arguments", [])
        fields.expect("scan_partition_indices", [])
        fields.expect("arguments", [])
        fields.expect("ordinality_idx", _NONE)
        fields.expect("source_ordinality", "WITHOUT_ORDINALITY")
        fields.expect("has_pushed_projection", False)
        fields.ignore("table_index", "positional_arguments", "has_serialize", "estimated_cardinality")
        extra = Fields(fields.take("extra_info", {}), "a scan")
        extra.expect("file_filters", "")
        extra.ignore("total_files", "filtered_files")
        extra.done()

    def _columns(self, table: str, returned: list[Column], indexes: list[Json]) -> Node:
        """The scan, and above it what is not a whole column of it."""
        positions: list[int] = []
        row: list[tuple[int | None, tuple[str, ...], str]] = []  # a place in positions, members below it, the type
        for json in indexes:
            index = Fields(json, "a scan's column")
            number = index.take("index", 0)
            index.expect("has_index", True)
            index.expect("field", "")
            if number == _ROWID:
                row.append((None, (), _NO_COLUMN.type))
                index.ignore("child_indexes", "index_type", "type")
                index.done()
                continue
            if number >= len(returned):
                raise NotPlannable("a virtual column of a table")
            if number not in positions:
                positions.append(number)
            position = positions.index(number)
            if index.take("index_type", "FULL_READ") == "PUSHDOWN_EXTRACT":
                members, type_ = self._extracted(index.take("type"), index.take("child_indexes"))
                row.append((position, members, type_))
            else:
                index.ignore("child_indexes")  # which members are needed is a hint
                index.expect("type", {"id": "INVALID"})
                row.append((position, (), returned[number].type))
            index.done()
        scan = Scan(table, tuple(positions), tuple(returned[i] for i in positions))
        if [place for place, _, _ in row] == list(range(len(positions))) and not any(members for _, members, _ in row):
            return scan
        exprs, names = [], []
        for place, members, type_ in row:
            expr = Expr(("CAST(NULL AS BIGINT)",), type_) if place is None else column(place, type_)
            for member in members:
                expr = text(type_, "struct_extract(", expr, f", {literal(member)})")
            if members:
                expr = text(type_, "CAST(", expr, f" AS {type_})")
            exprs.append(expr)
            names.append(members[-1] if members else "rowid" if place is None else scan.columns[place].name)
        return Project(scan, tuple(exprs), tuple(names))

    def _extracted(self, type_: Json, path: list[Json]) -> tuple[tuple[str, ...], str]:
        """The names on the way to a struct's member that is all a scan reads (2.0), and its type."""
        members: list[str] = []
        while path:
            (step,) = path
            member = type_["type_info"]["child_types"][step["index"]]
            if type_["id"] != "STRUCT" or not member["first"]:
                raise NotPlannable("a scan of a member that has no name")
            members.append(member["first"])
            # The last step may be a cast as well: its type is the one that is wanted.
            type_, path = member["second"] if step["child_indexes"] else step["type"], step["child_indexes"]
        return tuple(members), self._types.type(type_)

    def _range(self, name: str, returned: list[Column], fields: Fields) -> Node:
        parameters = ", ".join(self._types.constant(value) for value in fields.take("parameters"))
        fields.ignore("input_table_types", "input_table_names", "arguments", "original_arguments")
        self._expect_plain(fields)
        if self._only_column(fields) == _ROWID:
            return Fixed(f"SELECT NULL FROM {name}({parameters})", (_NO_COLUMN,))
        return Fixed(f"SELECT * FROM {name}({parameters})", tuple(returned))

    def _only_column(self, fields: Fields) -> int:
        (json,) = fields.take("column_indexes")
        index = Fields(json, "a scan's column")
        number = index.take("index")
        index.expect("has_index", True)
        index.expect("field", "")
        index.expect("index_type", "FULL_READ")
        index.expect("type", {"id": "INVALID"})
        index.expect("child_indexes", [])
        index.done()
        return int(number)

    def _filtered(self, node: Node, fields: Fields) -> Node:
        # 2.0 names a filter's column by its place among those read, 1.4 by its place in the table.
        by_place = fields.take("table_filters_by_projection", False)
        filters = Fields(fields.take("table_filters", {}), "a scan's filters")
        conditions: list[Expr] = []
        for json in filters.take("filters", []):
            entry = Fields(json, "a scan's filter")
            key = entry.take("key")
            place = key if by_place else self._place(node, key)
            target = Scope(node.columns).reference(place, node.columns[place].type)
            condition = self._condition(entry.take("value"), target, node, [place])
            entry.done()
            conditions += [condition] if condition else []
        for json in filters.take("multi_column_filters", []):
            condition = self._condition(json, None, node, json["column_indexes"])
            conditions += [condition] if condition else []
        filters.done()
        return Filter(node, tuple(conditions)) if conditions else node

    def _place(self, node: Node, number: int) -> int:
        """Where a column of the table stands in the node over its scan."""
        if isinstance(node, Scan):
            return node.positions.index(number)
        if isinstance(node, Project) and isinstance(node.child, Scan):
            place = node.child.positions.index(number)
            return [expr.position for expr in node.exprs].index(place)
        return number

    def _condition(self, json: Json, target: Expr | None, node: Node, places: list[int]) -> Expr | None:
        """None: the filter only helps."""
        fields = Fields(json, "a scan's filter")
        kind = fields.take("filter_type").removeprefix("LEGACY_")
        fields.what = f"a scan's {kind}"
        if kind == "OPTIONAL_FILTER":
            fields.ignore("child_filter", "final_filter")
            fields.done()
            return None
        if kind == "EXPRESSION_FILTER":
            fields.take("column_indexes", None)
            scope = Scope(tuple(node.columns[place] for place in places))
            read = self._expressions.read(fields.take("expr"), scope)
            fields.done()
            return read.moved(lambda position: places[position])
        if target is None:
            raise NotPlannable(f"a scan's {kind} over several columns")
        condition = self._simple(kind, fields, target, node, places)
        fields.done()
        return condition

    def _simple(self, kind: str, fields: Fields, target: Expr, node: Node, places: list[int]) -> Expr | None:
        if kind == "CONSTANT_COMPARISON":
            operator = COMPARISONS[fields.take("comparison_type")]
            return comparison(target, operator, Expr((self._types.constant(fields.take("constant")),), target.type))
        if kind in ("IS_NULL", "IS_NOT_NULL"):
            return text("BOOLEAN", "(", target, f" {kind.replace('_', ' ')})")
        if kind == "IN_FILTER":
            values = ", ".join(self._types.constant(value) for value in fields.take("values"))
            return text("BOOLEAN", "(", target, f" IN ({values}))")
        if kind in ("CONJUNCTION_AND", "CONJUNCTION_OR"):
            children = [self._condition(child, target, node, places) for child in fields.take("child_filters")]
            known = [child for child in children if child is not None]
            if kind == "CONJUNCTION_OR" and len(known) < len(children):
                return None
            return conjunction(known, kind.removeprefix("CONJUNCTION_")) if known else None
        if kind == "STRUCT_EXTRACT":
            fields.ignore("child_idx")
            child = fields.take("child_filter")
            member = text("", "struct_extract(", target, f", {literal(fields.take('child_name'))})")
            return self._condition(child, member, node, places)
        raise NotPlannable(f"a scan's filter {kind}")

    def _kept(self, node: Node, fields: Fields) -> Node:
        kept = fields.take("projection_ids", [])
        if not kept or kept == list(range(len(node.columns))):
            return node
        columns = [node.columns[i] for i in kept]
        exprs = tuple(column(i, c.type) for i, c in zip(kept, columns, strict=True))
        return Project(node, exprs, tuple(c.name for c in columns))

    def unnest(self, fields: Fields, child: Node) -> Node:
        """The table function unnest over a column of its input: the elements, then columns of the input."""
        name = self._expressions.function_name(fields)
        if name != "unnest":
            raise NotPlannable(f"the table function {name} over columns")
        fields.ignore("names")
        (type_,) = (self._types.type(type_) for type_ in fields.take("returned_types"))
        if self._only_column(fields) == _ROWID:
            raise NotPlannable("an UNNEST whose elements are not read")
        kept = fields.take("projected_input", [])
        fields.expect("projection_ids", [], [0])
        fields.expect("table_filters", {"filters": []}, {"filters": [], "multi_column_filters": []})
        fields.ignore("table_filters_by_projection", "input_table_types", "input_table_names", "arguments")
        self._expect_plain(fields)
        node = Unnest(child, (column(0, child.columns[0].type),), (type_,))
        order = [len(child.columns), *kept]
        exprs = tuple(column(i, node.columns[i].type) for i in order)
        return Project(node, exprs, tuple(node.columns[i].name for i in order))
