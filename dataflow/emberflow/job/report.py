"""A job as one HTML page: what it made, how its stages went, what went wrong.

The page stands alone: no script, no font, nothing from the network. It follows the reader's light or dark setting.
Whatever comes from a job (names, SQL, errors, what was printed) is escaped.

Does not know: where records lie.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from html import escape

from ..quantities import bytes_text, count_text, plural, seconds_text
from .drawing import COLOURS, colour_of, plan, timeline
from .history import JobInfo, JobRecord
from .shares import SKEW
from .tally import StageTally, Tally

_OUTPUT_CHARS_MAX = 200_000
_TROUBLES_MAX = 200
# Told apart by people who do not see red or green, on white and on black.
_PALETTE = ("#4c8bd6", "#e0953a", "#3aa88a", "#c65d9e", "#8a7fd1", "#a7a33c", "#5cb3d9", "#c9694f")
assert len(_PALETTE) == COLOURS

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --dim: #646b73; --line: #dfe3e8; --box: #f6f8fa;
  --good: #1a7f48; --bad: #c6302b; --busy: #a86500; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e4e7ea; --dim: #98a1aa; --line: #30363d;
  --box: #1d2227; --good: #4fc283; --bad: #ff7b72; --busy: #e3a53f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 28px 64px; max-width: 1130px; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 32px 0 10px; }
h3 { font-size: 14px; margin: 16px 0 4px; }
.dim, .small, .tick { color: var(--dim); fill: var(--dim); }
.state { font-size: 13px; font-weight: 600; padding: 2px 10px; border: 1px solid; border-radius: 12px;
  margin-left: 8px; vertical-align: 3px; white-space: nowrap; }
.done { color: var(--good); } .failed, .lost { color: var(--bad); } .running, .cancelled { color: var(--busy); }
.sums { display: grid; grid-template-columns: repeat(auto-fill, minmax(125px, 1fr)); gap: 10px; margin: 18px 0 0; }
.sums div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
.sums dt { color: var(--dim); font-size: 12px; } .sums dd { margin: 0; font-size: 17px; font-weight: 600; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin: 8px 0;
  overflow: auto; max-height: 420px; font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre.error { border-color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: 500; font-size: 12px; } th, td { padding: 5px 10px; text-align: right;
  vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td.text { white-space: pre-wrap;
  overflow-wrap: anywhere; } .warn { color: var(--busy); font-weight: 600; }
summary { cursor: pointer; } details { margin: 6px 0; }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
svg { display: block; font: 13px system-ui, "DejaVu Sans", sans-serif; } svg text { fill: var(--text); }
svg a { text-decoration: none; } svg .small, svg .tick { font-size: 12px; fill: var(--dim); }
svg .tick { text-anchor: middle; } svg .name { text-anchor: end; font-size: 12px; }
svg.plan { margin: 0 auto; }
.box rect:first-of-type { fill: var(--box); stroke: var(--line); } .box:hover rect:first-of-type { stroke: var(--dim); }
.box.reused rect:first-of-type { stroke-dasharray: 4 3; stroke: var(--dim); }
.box.running rect:first-of-type { stroke: var(--busy); } .box.unfinished rect:first-of-type { stroke: var(--bad); }
.arrow { fill: none; stroke: var(--dim); stroke-width: 1.3; } .head { fill: var(--dim); }
.rule { stroke: var(--line); fill: none; } .trouble { fill: var(--bad); }
""" + "".join(f".c{i} {{ fill: {c}; background: {c}; }}\n" for i, c in enumerate(_PALETTE))


def report(record: JobRecord) -> str:
    """The whole page."""
    info, tally = record.info, Tally(record.events)
    parts = [
        _head(info),
        _sums(info, tally),
        f"<h2>Query</h2><pre>{escape(info.query)}</pre>" if info.query else "",
    ]
    if tally.stages:
        parts += [
            "<h2>Plan</h2>",
            plan(tally.stages, is_running=info.state == "running"),
            "<h2>Stages</h2>",
            _stages(tally.stages.values()),
        ]
    if tally.runs or tally.troubles:
        parts += ["<h2>Timeline</h2>", timeline(tally)]
    parts += [_troubles(tally), _output(record.output)]
    if record.explain:
        parts.append(f"<h2>Plan as text</h2><pre>{escape(record.explain)}</pre>")
    title = escape(info.name or info.id)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n"
    )
    # Halves of characters, which names of files may hold, are nothing that a page can.
    return (page + "\n".join(filter(None, parts)) + "\n</body></html>\n").encode("utf-8", "replace").decode()


def _head(info: JobInfo) -> str:
    ended = "" if info.ended_s is None else f" to {_time(info.ended_s)}"
    if info.state == "lost":
        ended = f", last heard of {_time(info.seen_s)}"
    lines = [f"job {info.id}, {_time(info.started_s)}{ended} UTC"]
    lines.append(f"driver: process {info.pid} on {info.host}" if info.host else "")
    lines.append(", ".join(f"{name} {version}" for name, version in info.versions.items()))
    if info.target:
        lines.append(f"writes {info.target}")
    return (
        f'<h1>{escape(info.name or info.id)} <span class="state {escape(info.state)}">{escape(info.state)}</span></h1>'
        f'<div class="dim">{"<br>".join(escape(line) for line in lines if line)}</div>'
        + (f'<pre class="error">{escape(info.error)}</pre>' if info.error else "")
    )


def _sums(info: JobInfo, tally: Tally) -> str:
    stages = list(tally.stages.values())
    spilled = [stage.spilled_bytes for stage in stages if stage.spilled_bytes is not None]
    tasks, done = sum(stage.tasks for stage in stages), sum(stage.done for stage in stages)
    sums = {
        "wall": seconds_text(max(info.last_s - info.started_s, tally.at_s)),
        "CPU": seconds_text(sum(run.cpu_s for run in tally.runs)),
        "stages": str(len(stages)),
        "tasks": f"{tasks:,}" if done == tasks else f"{done:,} of {tasks:,}",
        "rows, all stages": count_text(sum(stage.rows for stage in stages)),
        "written": bytes_text(sum(stage.size_bytes for stage in stages)),
    }
    if spilled:
        sums["spilled"] = bytes_text(sum(spilled))
    counts = {
        "reused": sum(stage.reused for stage in stages),
        "retried": sum(stage.retries for stage in stages),
        "made again": sum(stage.recomputed for stage in stages),
        "speculated": sum(stage.speculated for stage in stages),
    }
    sums |= {name: f"{count:,}" for name, count in counts.items() if count}
    return '<dl class="sums">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in sums.items()) + "</dl>"


def _stages(stages: Iterable[StageTally]) -> str:
    columns = ("stage", "tasks", "rows", "bytes", "median", "longest", "skew", "CPU", "spilled", "retried")
    rows, details = [], []
    for stage in stages:
        tasks = f"{stage.tasks:,}" if stage.is_done else f"{stage.done:,} of {stage.tasks:,}"
        cells = [
            f"{tasks} ({stage.reused:,} reused)" if stage.reused else tasks,
            count_text(stage.rows),
            bytes_text(stage.size_bytes),
            _known(stage.median_s, seconds_text),
            _known(stage.max_s, seconds_text),
            _skew(stage.skew),
            seconds_text(stage.cpu_s) if stage.runs else "",
            _known(stage.spilled_bytes, bytes_text),
            f'<span class="warn">{stage.retries:,}</span>' if stage.retries else "",
        ]
        name = f'<i class="chip {colour_of(stage.id)}"></i>{stage.id} {escape(stage.label)}'
        rows.append(f'<tr id="stage-{stage.id}">{"".join(f"<td>{cell}</td>" for cell in [name, *cells])}</tr>')
        texts = [text for text in (stage.explain, stage.sql) if text]
        if texts:
            shown = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
            details.append(f"<h3>{stage.id} {escape(stage.label)}</h3>{shown}")
    runs = f"<details><summary>What the stages run</summary>{''.join(details)}</details>" if details else ""
    return _table(columns, rows) + runs


def _known(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _skew(skew: float | None) -> str:
    if skew is None:
        return ""
    text = f"{skew:.1f}x"
    return f'<span class="warn">{text}</span>' if skew > SKEW else text


def _troubles(tally: Tally) -> str:
    if not tally.troubles:
        return ""
    rows = [
        f"<tr><td>{seconds_text(event.at_s)}</td><td class=text>{escape(event.kind)}</td>"
        f"<td class=text>{escape(tally.name_of(event))}</td>"
        f"<td class=text>{escape(str(event.data.get('error', '')))}</td></tr>"
        for event in tally.troubles[:_TROUBLES_MAX]
    ]
    more = len(tally.troubles) - len(rows)
    note = f'<p class="dim">and {plural(more, "more event")}</p>' if more else ""
    return f"<h2>Trouble</h2>{_table(('at', 'event', 'task', 'error'), rows, texts=True)}{note}"


def _output(output: str) -> str:
    if not output:
        return ""
    cut = output[-_OUTPUT_CHARS_MAX:]
    note = f'<p class="dim">the last {len(cut):,} of {len(output):,} characters</p>' if len(cut) < len(output) else ""
    return f"<h2>What the tasks printed</h2>{note}<pre>{escape(cut)}</pre>"


def _table(columns: Sequence[str], rows: Sequence[str], *, texts: bool = False) -> str:
    kind = " class=text" if texts else ""
    heads = "".join(f"<th{kind}>{column}</th>" for column in columns)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def _time(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
