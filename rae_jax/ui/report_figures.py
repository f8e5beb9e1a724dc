"""The report's pictures and curves as HTML, and the series of the curves, which the page's script draws."""

import base64
import html
import math

from rae_jax.config.glossary import CURVES, RESULTS
from rae_jax.runtime import atomic_files

MAX_POINTS = 600  # points of a curve
MAX_PICTURES = 40  # pictures of a run, and of one kind by step
FILM_BYTES = 20_000_000  # size, about, of the pictures of one kind by step
PAGE_WIDTH = 1060  # pixels, inside the margins


def pictures(runs):
    """Return HTML with the pictures of the runs as a whole; pictures of one name are next to each other."""
    names = list(dict.fromkeys(name for run in runs for name in run.pictures))
    groups = []
    for name in names[:MAX_PICTURES]:
        having = [run for run in runs if name in run.pictures]
        figures = (_picture(run.pictures[name], _caption(runs, run, name), len(runs)) for run in having)
        groups.append("".join(figures))
    rows = groups if len(runs) > 1 else ["".join(groups)]
    left_out = len(names) - MAX_PICTURES
    more = f"<p>{left_out} more pictures are in samples/.</p>" if left_out > 0 else ""
    return f"<h2>Pictures</h2>{''.join(_side_by_side(row, runs) for row in rows)}{more}" if names else ""


def _side_by_side(figures, runs):
    return f"<div class=pictures style='--runs:{len(runs)}'>{figures}</div>"


def _caption(runs, run, name):
    return words(name) if len(runs) == 1 else f"{words(name)}, {html.escape(run.name)}"


def _picture(file, caption, columns):
    width, data = _png(file)
    return (
        f'<figure><img width={_page_width(width, columns)} alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _page_width(width, columns):
    """Return the width on the page, a whole multiple of the picture's, which keeps the pixels square."""
    return width * max(1, min(4, PAGE_WIDTH // columns // width))


def _png(file):
    """Return (width in pixels, base64) of a PNG file."""
    png = file.read_bytes()
    return max(int.from_bytes(png[16:20], "big"), 1), base64.b64encode(png).decode()


def pictures_by_step(runs):
    """Return HTML with the pictures of each stage, kind and run; a slider selects the step."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.pictures_by_step))
    text = ""
    for stage, kind in kinds:
        found = [(run, run.pictures_by_step.get((stage, kind))) for run in runs]
        films = "".join(_film(_caption(runs, run, kind), files, len(runs)) for run, files in found if files)
        text += f"<h3>{words(stage)}: {words(kind)}</h3>{_side_by_side(films, runs)}"
    return f"<h2>Pictures by step</h2>{text}" if kinds else ""


def _film(caption, files, columns):
    fitting = FILM_BYTES // max(1, atomic_files.size(files[-1][1]))
    kept = _evenly(files, max(2, min(MAX_PICTURES, fitting)))
    frames = [(step, *_png(file)) for step, file in kept]
    width = _page_width(frames[-1][1], columns)
    images = "".join(
        f'<img width={width} alt="{caption}, step {step}" data-step={step} src="data:image/png;base64,{data}"'
        f"{'' if i == len(frames) - 1 else ' hidden'}>"
        for i, (step, _, data) in enumerate(frames)
    )
    last = len(frames) - 1
    slider = f"<input type=range min=0 max={last} value={last} aria-label='step'>" if last else ""
    text = f"<figcaption>{caption}, step <output>{frames[-1][0]:,}</output> {slider}</figcaption>"
    return f"<figure class=film>{text}{images}</figure>"


def curves(runs):
    """Return (HTML with an empty <svg> for each curve, [[series of each run]] for the page's script)."""
    text, series = "", []
    for stage in dict.fromkeys(stage for run in runs for stage in run.metrics):
        rows = [run.metrics.get(stage, []) for run in runs]
        names = list(dict.fromkeys(name for found in rows for row in found for name in row if name != "step"))
        training = [name for name in names if not name.startswith("perf/")]
        speed = [name for name in names if name.startswith("perf/")]
        points = {
            name: [[(row["step"], row[name]) for row in found if name in row] for found in rows] for name in names
        }
        series += [[_thinned(run_points) for run_points in points[name]] for name in training + speed]
        last = max(row["step"] for found in rows for row in found)
        text += f"<h3>{words(stage)}, to step {last:,}</h3>"
        text += f"<div class=curves>{''.join(_curve(name, points[name]) for name in training)}</div>"
        if speed:
            figures = "".join(_curve(name, points[name]) for name in speed)
            text += f"<details><summary>Speed on this machine</summary><div class=curves>{figures}</div></details>"
    hint = (
        "<p>Faint: recorded values. Strong: smoothed values. Point at a curve to read its values. "
        "<label>Smoothing <input type=range id=smooth min=0 max=100 value=60></label> "
        "<label><input type=checkbox id=log> Logarithmic scale if all values are positive</label></p>"
    )
    return (f"<h2>Curves</h2>{hint}{text}" if series else ""), series


def _curve(name, points):
    facts = ""
    for i, run_points in enumerate(points):
        dot = f"<i style='background:var(--run{i % 4})'></i>" if len(points) > 1 else ""
        facts += f"<div class=facts>{dot}{_facts([value for _, value in run_points])}</div>" if run_points else ""
    meaning = CURVES.get(name) or RESULTS.get(name.removeprefix("eval/"), "")
    return (
        f"<figure class=curve><figcaption><b>{words(name.removeprefix('perf/'))}</b> {meaning}"
        f"</figcaption><svg viewBox='0 0 350 170'></svg>"
        f"{facts}</figure>"
    )


def _facts(values):
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no finite value"
    facts = f"min {min(finite):.4g}, max {max(finite):.4g}, last {finite[-1]:.4g}"
    return f"{facts}; {len(values) - len(finite)} not finite" if len(finite) < len(values) else facts


def _thinned(points):
    """Return a series of at most MAX_POINTS points, evenly spaced, with the last point; None for NaN and infinity."""
    kept = _evenly(points, MAX_POINTS)
    return {
        "steps": [step for step, _ in kept],
        "values": [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in kept],
    }


def _evenly(items, largest):
    """Return at most `largest` of the items, evenly spaced, with the last item."""
    stride = max(1, math.ceil(len(items) / largest))
    return items[(len(items) - 1) % stride :: stride]


def words(name):
    """Return a name as escaped text, with spaces for underscores."""
    return html.escape(name.replace("_", " "))
