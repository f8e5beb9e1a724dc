"""report.html: what a run has recorded, on one page that opens anywhere and offline."""

import base64
import datetime
import html
import json
import math
import pathlib
import re

from etils import epath

from rae_jax import logs

MAX_POINTS = 600  # of a curve
MAX_PICTURES = 40
PAGE_WIDTH = 1060  # pixels, inside the margins

RESULTS = {
    "psnr": "Peak signal-to-noise ratio of reconstructed held-out images, in dB: higher is better.",
    "ssim": "Structural similarity of reconstructed held-out images, at most 1: higher is better.",
    "lpips": "Distance of reconstructed held-out images to the given ones as people judge it: lower is better.",
    "rfid": "Fréchet Inception Distance of reconstructed to given held-out images: lower is better.",
    "fid": "Fréchet Inception Distance of generated to reference images: lower is better.",
    "sfid": "The same in Inception's features that still have a place in the image: lower is better.",
    "inception_score": "How sure of each and how varied in all Inception finds generated images: higher is better.",
    "precision": "Fraction of generated images that are like some reference image to Inception: higher is better.",
    "recall": "Fraction of reference images that are like some generated image to Inception: higher is better.",
    "fd": "Fréchet distance of generated to reference images in the encoder's features: lower is better.",
    "fd_real": "The same distance between two disjoint halves of real images: the floor for fd.",
    "agreement": "Fraction of generated images in which the judge sees the requested class: higher is better.",
    "judge_accuracy": "Accuracy of the judge on real held-out images: about what agreement can reach.",
    "probe": "Accuracy of a linear classifier on this encoder's features: higher is better.",
    "probe_random": "The same on features of an encoder with random weights, for comparison.",
    "probe_pixels": "The same on raw pixels, for comparison.",
    "seconds": "How long this took.",
}

CURVES = {
    "loss": "what training minimises",
    "accuracy": "fraction of the batch classified correctly",
    "cross_entropy": "classification loss",
    "pixels": "mean absolute error of predicted pixels",
    "l1": "mean absolute error of reconstructed pixels",
    "lpips": "perceptual distance of reconstructions",
    "adversarial": "how far the discriminator sees through: lower is better for the decoder",
    "adversarial_weight": "weight of the adversarial loss, 0 until it starts",
    "discriminator": "the discriminator's loss, 0 until it starts",
    "discriminator_grad_norm": "length of the discriminator's gradient before clipping",
    "logits_real": "the discriminator's verdict on real images",
    "logits_fake": "the discriminator's verdict on reconstructions",
    "grad_norm": "length of the gradient before clipping",
    "mean": "mean of the latents so far",
    "variance": "variance of the latents so far",
    "perf/images_per_second": "on all devices together",
    "perf/data_wait": "fraction of the time spent waiting for data",
}


def write_report(workdir):
    """Write WORKDIR/report.html from config.json, eval/, samples/ and metrics/, and return its path.

    Each of them may be missing. `workdir` is a str or an epath.Path, local or gs://.
    """
    workdir = epath.Path(workdir)
    config = _read_json(workdir / "config.json")
    curves, series = _curves(_metrics_files(workdir, config))
    body = _results(workdir) + _pictures(workdir) + curves
    parts = {
        "title": html.escape(str(config.get("name") or workdir.name or "run")),
        "written": f"{datetime.datetime.now().astimezone():%d %B %Y, %H:%M %Z}",
        "workdir": html.escape(str(workdir)),
        "body": body or "<p>Nothing has been recorded yet.</p>",
        "config": _config(config),
        "series": json.dumps(series, allow_nan=False).replace("<", "\\u003c"),  # no </script> inside a script
    }
    template = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # One pass over the template, so that nothing inserted is itself searched for places to insert.
    page = re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], template)
    path = workdir / "report.html"
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _results(workdir):
    files = sorted((workdir / "eval").glob("*.json"))
    return "<h2>Results</h2>" * bool(files) + "".join(_result_table(file) for file in files)


def _result_table(file):
    values = dict(_flat(_read_json(file)))
    pairs = {name for name in values if f"trained_{name}" in values}
    heads = ("shipped weights", "trained here") if pairs else ("value",)
    rows = [f"<tr><th></th>{''.join(f'<th class=number>{head}</th>' for head in heads)}</tr>"]
    for name, value in values.items():
        if name.removeprefix("trained_") in pairs and name not in pairs:
            continue
        if name in pairs:
            cells = f"<td class=number>{_show(value)}</td><td class=number>{_show(values[f'trained_{name}'])}</td>"
        else:  # about neither column in particular
            cells = f"<td class=number colspan={len(heads)}>{_show(value)}</td>"
        about = f"<div class=about>{RESULTS.get(name, '')}</div>"
        rows.append(f"<tr><th>{html.escape(name)}{about}</th>{cells}</tr>")
    return f"<h3>{_words(file.stem)}</h3><div class=wide><table>{''.join(rows)}</table></div>"


def _show(value):
    """A result as escaped text; four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return html.escape(str(value))


def _pictures(workdir):
    files = sorted((workdir / "samples").glob("*.png"))
    figures = "".join(_picture(file) for file in files[:MAX_PICTURES])
    more = f"<p>{len(files) - MAX_PICTURES} more in samples/.</p>" if len(files) > MAX_PICTURES else ""
    return f"<h2>Pictures</h2><div class=pictures>{figures}</div>{more}" if files else ""


def _picture(file):
    png = file.read_bytes()
    width = max(int.from_bytes(png[16:20], "big"), 1)  # where PNG keeps it
    shown = width * max(1, min(4, PAGE_WIDTH // width))  # whole multiples keep the pixels square
    data = base64.b64encode(png).decode()
    words = _words(file.stem)
    return (
        f'<figure><img width={shown} alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _metrics_files(workdir, config):
    """In the order in which the stages run; those that the config does not name come last."""
    stages = list(config.get("stages") or ())
    files = sorted((workdir / "metrics").glob("*.jsonl"))
    return sorted(files, key=lambda file: stages.index(file.stem) if file.stem in stages else len(stages))


def _curves(files):
    """(HTML with an empty <svg> for each curve, the series that the page's script draws there, in the same order)."""
    text, series = "", []
    for file in files:
        rows = logs.read(file)
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
        training = [name for name in names if not name.startswith("perf/")]
        speed = [name for name in names if name.startswith("perf/")]
        points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
        series += [_thinned(points[name]) for name in training + speed]
        text += f"<h3>{_words(file.stem)}, to step {rows[-1]['step']:,}</h3>"
        text += f"<div class=curves>{''.join(_curve(name, points[name]) for name in training)}</div>"
        if speed:
            figures = "".join(_curve(name, points[name]) for name in speed)
            text += f"<details><summary>Speed on this machine</summary><div class=curves>{figures}</div></details>"
    hint = (
        "<p>Faint: as recorded. Strong: smoothed. Point at a curve to read it. "
        "<label><input type=checkbox id=log> Logarithmic, where all values are positive</label></p>"
    )
    return (f"<h2>Curves</h2>{hint}{text}" if series else ""), series


def _curve(name, points):
    values = [value for _, value in points if math.isfinite(value)]
    facts = f"min {min(values):.4g}, max {max(values):.4g}, last {values[-1]:.4g}" if values else "no finite value"
    if 0 < len(values) < len(points):
        facts += f"; {len(points) - len(values)} not finite"
    meaning = CURVES.get(name) or RESULTS.get(name.removeprefix("eval/"), "")
    return (
        f"<figure class=curve><figcaption><b>{_words(name.removeprefix('perf/'))}</b> {meaning}"
        f"</figcaption><svg viewBox='0 0 350 170'></svg><div class=facts>{facts}</div></figure>"
    )


def _thinned(points):
    """At most MAX_POINTS of them, evenly spaced and with the last one; null (None) where a value is not finite."""
    stride = math.ceil(len(points) / MAX_POINTS)
    kept = points[(len(points) - 1) % stride :: stride]
    return {
        "steps": [step for step, _ in kept],
        "values": [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in kept],
    }


def _config(config):
    rows = (
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for key, value in _flat(config)
    )
    return f"<details><summary>Config</summary><div class=wide><table>{''.join(rows)}</table></div></details>"


def _flat(tree, prefix=""):
    """(dotted key, value) of nested dicts, in order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_json(path):
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:  # cut off by a crash: no reason to lose the rest of the report
        return {"unreadable": f"{path.name} is cut off"}


def _words(name):
    return html.escape(name.replace("_", " "))
