"""report.html: the records of one or several runs on one page that can be read offline.

    python -m rae_jax.report --workdir=runs/small                                  # writes runs/small/report.html again
    python -m rae_jax.report --workdir=runs/a --workdir=runs/b --output=both.html  # compares two runs

The template report.html holds the page's script, which draws the curves; the page also holds the series of the curves.
"""

import datetime
import html
import json
import pathlib
import re
import statistics

from absl import app, flags
from etils import epath

from rae_jax.config.glossary import RESULTS
from rae_jax.config.keys import flatten
from rae_jax.errors import UserError
from rae_jax.runtime import command_line
from rae_jax.ui import report_figures, workdir_reader
from rae_jax.ui.report_figures import words


def write_report(workdir):
    """Write WORKDIR/report.html from the files of the workdir, and return its path.

    Each of config.json, eval/, samples/, metrics/, environment.jsonl may be missing. `workdir` is a str or an
    epath.Path, local or gs://.
    """
    return write_comparison([workdir], epath.Path(workdir) / "report.html")


def write_comparison(workdirs, output):
    """Write a page that compares several runs to the file `output`, and return its path."""
    runs = [workdir_reader.Run(epath.Path(workdir)) for workdir in workdirs]
    curves, series = report_figures.curves(runs)
    body = (
        _legend(runs)
        + _results(runs)
        + report_figures.pictures(runs)
        + report_figures.pictures_by_step(runs)
        + curves
        + _speed(runs)
    )
    names = [run.name for run in runs]
    parts = {
        "title": html.escape(" and ".join(names)),
        "written": f"{datetime.datetime.now().astimezone():%d %B %Y, %H:%M %Z}",
        "workdir": html.escape(", ".join(str(run.workdir) for run in runs)),
        "body": body or "<p>Nothing has been recorded yet.</p>",
        "config": _environment(runs) + _config(runs),
        "series": json.dumps(series, allow_nan=False).replace("<", "\\u003c"),  # no </script> inside a script
    }
    template = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # One pass over the template: inserted text is not searched for further places.
    page = re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], template)
    path = epath.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _legend(runs):
    """Return the legend, the colour of each run; empty for a single run."""
    if len(runs) == 1:
        return ""
    names = (
        f"<span><i style='background:var(--run{i % 4})'></i><b>{html.escape(run.name)}</b> "
        f"<span class=soft>{html.escape(str(run.workdir))}</span></span>"
        for i, run in enumerate(runs)
    )
    return f"<div class=legend>{''.join(names)}</div>"


def _results(runs):
    if len(runs) == 1:
        tables = "".join(_result_table(name, values) for name, values in runs[0].results.items())
    else:
        tables = _compared_results(runs)
    return "<h2>Results</h2>" + tables if tables else ""


def _result_table(name, values):
    pairs = {name for name in values if f"trained_{name}" in values}
    heads = ("shipped weights", "trained here") if pairs else ("value",)
    rows = [_head(heads)]
    for metric, value in values.items():
        if metric.removeprefix("trained_") in pairs and metric not in pairs:
            continue
        if metric in pairs:
            cells = f"<td class=number>{_show(value)}</td><td class=number>{_show(values[f'trained_{metric}'])}</td>"
        else:  # a value that belongs to neither column
            cells = f"<td class=number colspan={len(heads)}>{_show(value)}</td>"
        rows.append(_result_row(metric, cells))
    return f"<h3>{words(name)}</h3><div class=wide><table>{''.join(rows)}</table></div>"


def _compared_results(runs):
    """Return one table of the runs' own evaluations; of shipped and trained weights it takes the trained weights."""
    values = []
    for run in runs:
        found = run.results.get(run.name, {})
        trained = {key.removeprefix("trained_"): value for key, value in found.items() if key.startswith("trained_")}
        values.append({**found, **trained})
    metrics = [key for key in dict.fromkeys(key for found in values for key in found) if not key.startswith("trained_")]
    if not metrics:
        return ""
    rows = [_head([run.name for run in runs])]
    for metric in metrics:
        cells = "".join(f"<td class=number>{_show(found.get(metric))}</td>" for found in values)
        rows.append(_result_row(metric, cells))
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _head(names):
    return f"<tr><th></th>{''.join(f'<th class=number>{html.escape(name)}</th>' for name in names)}</tr>"


def _result_row(metric, cells):
    return f"<tr><th>{html.escape(metric)}<div class=about>{RESULTS.get(metric, '')}</div></th>{cells}</tr>"


def _show(value):
    """Return a result as escaped text with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return html.escape(str(value))


def _speed(runs):
    """Return a table of each stage's steps and of its median throughput."""
    columns = {"steps/s": "perf/steps_per_second", "images/s": "perf/images_per_second", "waiting": "perf/data_wait"}
    rows = []
    for run in runs:
        for stage, found in run.metrics.items():
            cells = [f"{found[-1]['step']:,}"]
            for head, name in columns.items():
                values = [row[name] for row in found if name in row]
                value = statistics.median(values) if values else None
                cells.append(f"{value:.1%}" if values and head == "waiting" else _show(value))
            name = words(stage) if len(runs) == 1 else f"{words(stage)}, {html.escape(run.name)}"
            rows.append(f"<tr><th>{name}</th>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>")
    head = _head(["steps", *("waiting for data" if head == "waiting" else head for head in columns)])
    about = "<p class=soft>Medians over the run.</p>"
    return f"<h2>Throughput</h2>{about}<div class=wide><table>{head}{''.join(rows)}</table></div>" if rows else ""


def _environment(runs):
    """Return a table of the software and hardware at every start of every run."""
    starts = [(run, start) for run in runs for start in run.starts]
    if not starts:
        return ""
    heads = [run.name if len(runs) > 1 else f"start {i}" for i, (run, _) in enumerate(starts, 1)]
    names = dict.fromkeys(name for _, start in starts for name in start)
    rows = [f"<tr><th></th>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"]
    for name in names:
        cells = "".join(f"<td>{_show(start.get(name))}</td>" for _, start in starts)
        rows.append(f"<tr><th>{words(name)}</th>{cells}</tr>")
    return f"<h2>Environment</h2><div class=wide><table>{''.join(rows)}</table></div>"


def _config(runs):
    """Return a table of all config keys; of several runs, first a table of keys whose values differ."""
    flat = [flatten(run.config) for run in runs]
    names = list(dict.fromkeys(key for values in flat for key in values))

    def table(names):
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th>{''.join(f'<td>{_value(values, key)}</td>' for values in flat)}</tr>"
            for key in names
        )
        heads = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
        head = f"<tr><th></th>{heads}</tr>" if len(runs) > 1 else ""
        return f"<div class=wide><table>{head}{rows}</table></div>"

    differing = [key for key in names if any(_value(values, key) != _value(flat[0], key) for values in flat)]
    found = "<h2>Config</h2>" + (f"<p>Keys that differ:</p>{table(differing)}" if differing else "")
    return found + f"<details><summary>All keys</summary>{table(names)}</details>"


def _value(values, key):
    return html.escape(json.dumps(values[key], ensure_ascii=False)) if key in values else "–"


def main():
    """Define the flags and run the command."""
    about = "Folder of a run; repeat it to compare runs."
    flags.DEFINE_multi(command_line.PATH, flags.ArgumentSerializer(), "workdir", None, about, required=True)
    flags.DEFINE(command_line.PATH, "output", None, "File of the page; by default report.html in the workdir.")
    command_line.show_in_help(__name__)
    app.run(_run, flags_parser=command_line.plain_parser)


def _run(argv):
    given = flags.FLAGS
    workdirs, output = given.workdir, given.output
    try:
        for workdir in workdirs:
            if not epath.Path(workdir).is_dir():
                raise UserError(f"--workdir={workdir} is no folder: name the folder of a run")
        if output is None and len(workdirs) > 1:
            raise UserError("--output is missing: a page of several runs needs --output=FILE.html")
        print(write_comparison(workdirs, output) if output else write_report(workdirs[0]))
    except UserError as error:
        command_line.fail(str(error))


if __name__ == "__main__":
    main()
