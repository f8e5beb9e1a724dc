"""Draw the plot of an experiment: a PNG with panels; error bars are sample standard deviations over seeds.

A panel is data: 'y', a metric; 'x', a metric or 'step', or missing for bars over variants; 'series', {label: variants}
for lines; 'by_step', one line over checkpoints for each variant; 'bars', the variants of bars; 'also', more metrics;
'lines', {label: (variant, {x: generator})} over the generators of a run, with 'over', the label of x, and 'log', the
axes that are logarithmic ('x', 'xy').
"""

import io

from launch.study import verdict

_COLOURS = ("#0b6fa4", "#c2570c", "#3f8f3f", "#8e44ad", "#7f6000", "#b03060", "#444444")


def draw(study, found):
    """Return PNG bytes, or None without results. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values, panels = verdict.last(found), study["plots"]
    if not values:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(max(5.6, 4.4 * len(panels)), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel.get("by_step"):
            _by_step(axis, panel, study, found)
        elif "over" in panel:
            _over_generators(axis, panel, values)
        elif "x" in panel:
            _lines(axis, panel, values)
        else:
            _bars(axis, panel, panel.get("bars") or list(study["variants"]), values)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(study["title"], x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return file.getvalue()


def label(metric):
    """Return the name of a metric as plots and tables show it."""
    return metric.split(".")[-1].replace("_", " ")


def _bars(axis, panel, variants, values):
    shown = [name for name in variants if (name, panel["y"]) in values]
    points = [verdict.mean_and_spread(values[name, panel["y"]]) for name in shown]
    places = range(len(shown))
    colours = [_COLOURS[variants.index(name) % len(_COLOURS)] for name in shown]
    axis.barh(places, [mean for mean, *_ in points], xerr=[spread or 0 for _, spread, _ in points], color=colours)
    axis.set_yticks(places, shown, fontsize=8)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=5)  # more labels would overlap
    axis.set_xlabel(label(panel["y"]))


def _lines(axis, panel, values):
    for number, (name, variants) in enumerate(panel["series"].items()):
        for metric in (panel["y"], *(panel.get("also", ()) if not number else ())):
            shown = [v for v in variants if (v, metric) in values and (v, panel["x"]) in values]
            xs = [verdict.mean_and_spread(values[v, panel["x"]])[0] for v in shown]
            points = [verdict.mean_and_spread(values[v, metric]) for v in shown]
            own = metric == panel["y"]
            style = {"label": name, "marker": "o", "capsize": 3} if own else {"label": label(metric), "ls": "--"}
            colour = _COLOURS[number] if own else _COLOURS[2 + panel["also"].index(metric)]
            spreads = [spread or 0 for _, spread, _ in points] if own else None
            axis.errorbar(xs, [mean for mean, *_ in points], yerr=spreads, color=colour, ms=4, **style)
    axis.set_xlabel(label(panel["x"]))
    axis.set_ylabel(label(panel["y"]))
    if len(panel["series"]) > 1 or panel.get("also"):
        axis.legend(fontsize=8, frameon=False)


def _over_generators(axis, panel, values):
    for number, (name, (variant, generators)) in enumerate(panel["lines"].items()):
        metrics = {x: verdict.metric_of(generator, panel["y"]) for x, generator in generators.items()}
        xs = [x for x, metric in metrics.items() if (variant, metric) in values]
        points = [verdict.mean_and_spread(values[variant, metrics[x]]) for x in xs]
        style = {"label": name, "marker": "o", "ms": 4, "capsize": 3, "color": _COLOURS[number % len(_COLOURS)]}
        axis.errorbar(xs, [mean for mean, *_ in points], yerr=[spread or 0 for _, spread, _ in points], **style)
    for name in panel.get("log", ""):
        axis.set(**{f"{name}scale": "log"})
        getattr(axis, f"{name}axis").set_major_formatter("{x:g}")
    axis.set_xlabel(panel["over"])
    axis.set_ylabel(label(panel["y"]))
    axis.legend(fontsize=7, frameon=False)


def _by_step(axis, panel, study, found):
    ys, xs = (verdict.by_step(found, panel[of]) if panel[of] != "step" else None for of in ("y", "x"))
    for number, variant in enumerate(study["variants"]):
        steps = sorted(ys.get(variant, {}))
        if not steps:
            continue
        at = steps if xs is None else [verdict.mean_and_spread(xs[variant][step])[0] for step in steps]
        points = [verdict.mean_and_spread(ys[variant][step]) for step in steps]
        spreads = [spread or 0 for _, spread, _ in points]
        colour = _COLOURS[number % len(_COLOURS)]
        means = [mean for mean, *_ in points]
        axis.errorbar(at, means, yerr=spreads, color=colour, label=variant, marker="o", ms=4, capsize=3)
    axis.set_xlabel(label(panel["x"]))
    axis.set_ylabel(label(panel["y"]))
    axis.legend(fontsize=7, frameon=False)
