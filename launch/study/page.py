"""Write the results of the experiments: NAME.csv, NAME.png, summary.json, results.md and index.html."""

import base64
import csv
import html
import io
import json

from launch.study import plan, plots, verdict

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.6em 0; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #ddd; } .soft { color: #666; } img { max-width: 100%; }
.every { color: #20702a; } .average { color: #8a6100; } .not { color: #a02020; }
"""


def write(folder, studies, found, cpu):
    """Write the files of `studies` ({name: data}) to `folder`; return the path of the page.

    `found`: {name: {(variant, seed): rows}}; `cpu`: {name: CPU seconds}, also for 'foundations'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary, sections, texts = {}, [], []
    for name, study in studies.items():
        (folder / f"{name}.csv").write_text(_csv(found[name]))
        picture = plots.draw(study, found[name])
        if picture:
            (folder / f"{name}.png").write_bytes(picture)
        summary[name] = summarise(study, found[name], cpu[name])
        sections.append(_section(name, study, summary[name], picture))
        texts.append(_markdown(study, summary[name]))
    (folder / "summary.json").write_text(json.dumps({"studies": summary, "cpu_seconds": cpu}, indent=1) + "\n")
    (folder / "results.md").write_text("\n".join(texts))
    title = f"The paper's claims at small scale: {folder.name}"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    about = "<p>Mean ± sample standard deviation over seeds. A verdict says in how many seeds the order of the numbers "
    about += "is as claimed. fd: Fréchet distance to held-out images; all runs use the same encoder's features.</p>"
    spent = f"<p class=soft>CPU seconds: {', '.join(f'{name} {cpu[name]:.0f}' for name in cpu)}.</p>"
    page = folder / "index.html"
    page.write_text(head + about + "".join(sections) + spent, encoding="utf-8")
    return page


def summarise(study, found, cpu):
    """Return plain data: {metric: {'mean', 'std', 'seeds'}} for each variant, the verdicts, CPU seconds."""
    values = verdict.last(found)
    table = {}
    for (variant, metric), by_seed in values.items():
        mean, spread, seeds = verdict.mean_and_spread(by_seed)
        table.setdefault(variant, {})[metric] = {"mean": mean, "std": spread, "seeds": seeds}
    verdicts = {comparison["says"]: verdict.verdict(values, comparison) for comparison in study["compare"]}
    return {"variants": table, "verdicts": verdicts, "cpu_seconds": cpu}


def _csv(found):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("variant", "seed", "step", "metric", "value"))
    for (variant, seed), rows in found.items():
        writer.writerows((variant, seed, row["step"], row["metric"], repr(row["value"])) for row in rows)
    return file.getvalue()


def _tables(study, summary):
    """Return [(names of columns, [[row's name, formatted number, ...]])] of the variants that have results."""
    order = [variant for variant in study["variants"] if variant in summary["variants"]]
    tables = [(study["columns"], [_row(summary, v, v, study["columns"]) for v in order])]
    if columns := study.get("columns_of_generators"):
        of_each = [(v, name) for v in order for name in plan.generators_of(study, v) if name]
        rows = [
            _row(summary, v, f"{v}, {name}", [verdict.metric_of(name, metric) for metric in columns])
            for v, name in of_each
        ]
        tables.append((columns, rows))
    return tables


def _row(summary, variant, name, metrics):
    return [name, *(_number(summary["variants"][variant].get(metric)) for metric in metrics)]


def _number(entry):
    if entry is None:
        return "–"
    spread = f" ± {entry['std']:.2g}" if entry["std"] is not None else ""
    return f"{entry['mean']:.3g}{spread}"


def _about(study, summary):
    """Return the note with the number of seeds and the CPU seconds."""
    counts = {of["seeds"] for metrics in summary["variants"].values() for of in metrics.values()}
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "no"
    return f"{study['note']} Seeds: {seeds}; CPU seconds: {summary['cpu_seconds']}."


def _section(name, study, summary, picture):
    text = f"<h2 id={name}>{html.escape(study['title'])}</h2><p><b>Claim.</b> {html.escape(study['claim'])}</p>"
    for says, words in summary["verdicts"].items():
        kind = {"in": "every", "on": "average"}.get(words.split()[0], "not")
        text += f"<div class={kind}><b>{words}</b>: {html.escape(says)}</div>"
    if picture:
        data = base64.b64encode(picture).decode()
        text += f'<p><img alt="{html.escape(study["title"])}" src="data:image/png;base64,{data}"></p>'
    if not summary["variants"]:
        return text
    text += "".join(_html_table(columns, rows) for columns, rows in _tables(study, summary))
    text += f"<p class=soft>{html.escape(_about(study, summary))}</p>"
    paper = "".join(f"<tr><td>{html.escape(what)}</td><td class=number>{n}</td></tr>" for what, n in study["paper"])
    return text + f"<h3>The paper's numbers</h3><table>{paper}</table>"


def _html_table(columns, rows):
    head = "".join(f"<th class=number>{plots.label(metric)}</th>" for metric in columns)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>{''.join(f'<td class=number>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _markdown(study, summary):
    lines = [f"## {study['title']}", "", study["claim"], ""]
    if not summary["variants"]:
        return "\n".join([*lines, f"**{verdict.NOT_RUN}**", ""])
    lines += [f"- **{words}**: {says}" for says, words in summary["verdicts"].items()]
    for columns, rows in _tables(study, summary):
        lines += ["", f"| | {' | '.join(plots.label(metric) for metric in columns)} |"]
        lines += [f"| --- |{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    paper = "; ".join(f"{what}: {n}" if n else what for what, n in study["paper"])
    lines += ["", _about(study, summary), "", f"Paper: {paper}."]
    return "\n".join(lines) + "\n"
