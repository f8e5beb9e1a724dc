"""The results of the experiments of configs/study/: verdicts, tables, plots and the page."""

import json

import pytest

from launch.study import page, plan, plots, verdict


@pytest.mark.parametrize(
    "lower, higher, words",
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "in every seed (3 of 3)"),
        ([1.0, 2.0, 3.0], [9.0, 2.5, 2.5], "on average (2 of 3)"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 0.0], "does not show (2 of 3)"),
        ([1.0], [1.0], "does not show (0 of 1)"),
        ([], [1.0], "not run"),
    ],
)
def test_a_verdict_is_computed(lower, higher, words):
    values = {("a", "fd"): dict(enumerate(lower)), ("b", "fd"): dict(enumerate(higher))}
    comparison = {"says": "", "metric": "fd", "lower": ["a"], "higher": ["b"]}
    assert verdict.verdict(values, comparison) == words


def test_a_verdict_compares_several_variants_and_metrics():
    values = {("a", "x"): {0: 1.0}, ("b", "x"): {0: 3.0}, ("c", "x"): {0: 2.0}, ("c", "bound"): {0: 0.5}}
    sides = {"says": "", "metric": "x", "lower": ["a"], "higher": ["b", "c"]}
    assert verdict.verdict(values, sides) == "in every seed (1 of 1)"
    assert verdict.verdict(values, {**sides, "lower": ["a", "b"], "higher": ["c"]}) == "does not show (0 of 1)"
    assert verdict.verdict(values, {**sides, "lower": [("c", "bound")], "higher": ["a"]}) == "in every seed (1 of 1)"


def _rows(metrics, step=0):
    return [{"step": step, "metric": name, "value": value} for name, value in metrics.items()]


def test_results_are_written_as_tables_page_and_plots(tmp_path):
    """For two experiments, of which one has not run yet."""
    studies = {name: plan.read(name) for name in ("head", "width")}
    numbers = {"fd": 3.0, "agreement": 0.5, "loss": 1.0, "forward_gflops": 0.02}
    by_step = [row for step in (200, 400) for row in _rows({"fd": 900 / step, "training_gflops": step * 1.0}, step)]
    head = {
        (variant, seed): _rows({**numbers, "fd": 3.0 + seed + number}) + by_step
        for number, variant in enumerate(studies["head"]["variants"])
        for seed in range(3)
    }
    written = page.write(
        tmp_path, studies, {"head": head, "width": {}}, {"head": 12.0, "width": 0.0, "foundations": 3.0}
    )
    summary = json.loads((tmp_path / "summary.json").read_text())["studies"]
    assert summary["head"]["variants"]["plain, width 104"]["fd"] == {"mean": 5.0, "std": 1.0, "seeds": 3}
    assert set(summary["width"]["verdicts"].values()) == {"not run"}
    assert "**not run**" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "head.csv").read_text().count("\n") == 1 + 5 * 3 * 8
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "width.png").exists()
    text = written.read_text()
    assert "5 ± 1" in text and "does not show (0 of 3)" in text and "data:image/png" in text and "2.16" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "| plain, width 104 | 5 ± 1 |" in (tmp_path / "results.md").read_text()
    assert plots.draw(studies["width"], {}) is None


def test_generators_have_a_table_and_lines(tmp_path):
    study = plan.read("raev2")
    found, number = {}, 0
    for variant in study["variants"]:
        metrics = {}
        for name in plan.generators_of(study, variant):
            number += 1
            metrics |= {verdict.metric_of(name, metric): float(number) for metric in ("fd", "agreement")}
        found[variant, 0] = _rows(metrics)
    page.write(tmp_path, {"raev2": study}, {"raev2": found}, {"raev2": 1.0, "foundations": 1.0})
    text = (tmp_path / "results.md").read_text()
    last = list(plan.generators_of(study, "RAEv2's DiT"))[-1]
    assert f"| RAEv2's DiT, {last} | {number} | {number} |" in text and "not run" not in text
    assert text.count("| DiT^DH, velocity, ") == len(plan.generators_of(study, "DiT^DH, velocity")) - 1
    assert (tmp_path / "raev2.png").read_bytes().startswith(b"\x89PNG")
