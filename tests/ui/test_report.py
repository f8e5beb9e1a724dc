import base64
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from rae_jax.runtime import environment
from rae_jax.ui import report, report_figures
from rae_jax.ui.workdir_reader import Run


@pytest.fixture
def workdir(tmp_path):
    for folder in ("metrics", "samples", "eval"):
        (tmp_path / folder).mkdir()
    config = {"name": "a <b> run", "stages": ["encoder", "dit"], "data": {"path": "</script><script>alert(1)</script>"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"step": n, "loss": 1 / n, "l<1": 0.5, "perf/steps_per_second": 9.0}) for n in range(1, 2001)]
    lines[99] = '{"step": 100, "loss": NaN, "l<1": Infinity}'
    (tmp_path / "metrics" / "dit.jsonl").write_text("\n".join(lines) + '\n{"step": 2001, "lo')
    (tmp_path / "metrics" / "encoder.jsonl").write_text('{"step": 7, "accuracy": 0.25}\n')
    (tmp_path / "metrics" / "another.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    results = {"psnr": 21.98765, "trained_psnr": 18.12345, "fd_real": None, "seconds": 12345.6, "note": ["<i>", 2]}
    (tmp_path / "eval" / "small.json").write_text(json.dumps(results))
    Image.new("RGB", (64, 32), "red").save(tmp_path / "samples" / "generated_step_5.png")
    return tmp_path


def series(page):
    def refuse(name):
        raise ValueError(name)

    text = re.search(r'<script type="application/json" id="series">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text, parse_constant=refuse)


def page_of(workdir):
    path = report.write_report(str(workdir))
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


def test_pictures_are_inside(workdir):
    page = page_of(workdir)
    picture = re.search(r'<img width=256 alt="generated step 5" src="data:image/png;base64,(.*?)">', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture[1]))).size == (64, 32)


def test_results_pair_shipped_and_trained(workdir):
    page = page_of(workdir)
    assert re.search("<th>psnr<.*?</th><td class=number>21.99</td><td class=number>18.12</td>", page)
    assert "trained_psnr" not in page
    assert re.search("<th>fd_real<.*?</th><td class=number colspan=2>–</td>", page)
    assert "<td class=number colspan=2>12,346</td>" in page and "&lt;i&gt;, 2" in page


def test_results_without_pairs_have_one_column(workdir):
    (workdir / "eval" / "small.json").write_text('{"probe": 0.75}')
    page = page_of(workdir)
    assert "<th class=number>value</th>" in page and "shipped weights" not in page


def test_curves_keep_order_and_gaps(workdir):
    page = page_of(workdir)
    assert re.findall(r"<h3>(\w+), to step ([\d,]+)<", page) == [("encoder", "7"), ("dit", "2,000"), ("another", "1")]
    assert all(len(of_runs) == 1 for of_runs in series(page))
    (accuracy, loss, constant, speed, empty) = (of_runs[0] for of_runs in series(page))
    assert accuracy == {"steps": [7], "values": [0.25]}
    assert len(loss["steps"]) <= report_figures.MAX_POINTS and loss["steps"][-1] == 2000
    assert None in loss["values"] and set(constant["values"]) == {0.5, None}
    assert set(speed["values"]) == {9.0} and page.count("Speed on this machine") == 1
    assert empty["values"] == [None]
    assert "min 0.0005, max 1, last 0.0005; 1 not finite" in page and "no finite value" in page
    assert page.count("<svg") == 5


def test_page_is_self_contained_and_escaped(workdir):
    page = page_of(workdir)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", page)
    assert "<title>a &lt;b&gt; run</title>" in page
    assert "alert(1)</script>" not in page and "data.path" in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "l&lt;1" in page and "<!--" not in page


def test_files_cut_off_by_a_crash_do_not_lose_the_rest(workdir):
    (workdir / "eval" / "small.json").write_text('{"psnr": 2')
    (workdir / "config.json").write_text("")
    (workdir / "environment.jsonl").write_bytes(b'{"python": "3"}\n\xff\n')
    (workdir / "eval" / "other.json").write_bytes(b"\xff[1]")
    (workdir / "samples" / "cut.png").write_bytes(b"")
    page = page_of(workdir)
    assert "small.json is cut off" in page and "other.json is cut off" in page and "generated step 5" in page


def test_empty_workdir(tmp_path):
    page = page_of(tmp_path)
    assert "Nothing has been recorded yet." in page
    assert series(page) == []


def _picture_at(workdir, step, colour):
    path = workdir / "samples" / "dit" / f"{step:07d}_samples.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_pictures_by_step_have_a_slider(workdir):
    for step in range(1, 50):
        _picture_at(workdir, step, (step, 0, 0))
    page = page_of(workdir)
    frames = re.findall(r'data-step=(\d+) src="data:image/png;base64,(.*?)"( hidden)?>', page)
    assert len(frames) <= report_figures.MAX_PICTURES and [step for step, _, hidden in frames if not hidden] == ["49"]
    step, data, _ = frames[3]
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (int(step), 0, 0)
    assert f"max={len(frames) - 1}" in page and "<h3>dit: samples</h3>" in page


def test_starts_are_recorded_and_shown(workdir):
    environment.record(workdir)
    environment.record(workdir)
    one, other = Run(workdir).starts
    assert one["jax"] == other["jax"] and one["devices"].startswith("8 x ") and one["processes"] == 1
    page = page_of(workdir)
    assert "<th>start 2</th>" in page and f"<td>{one['jax']}</td><td>{one['jax']}</td>" in page


def test_throughput_is_the_median(workdir):
    rows = [{"step": n, "perf/images_per_second": v, "perf/data_wait": 0.25} for n, v in ((1, 1.0), (2, 8.0), (3, 9.0))]
    (workdir / "metrics" / "encoder.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [3, "–", "8", "25.0%"]
    assert f"<th>encoder</th>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}" in page_of(workdir)


def test_two_runs_side_by_side(workdir, tmp_path):
    other = tmp_path / "other"
    for folder in ("metrics", "samples", "eval"):
        (other / folder).mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({"name": "lower rate", "stages": ["dit"], "data": {"path": "x"}}))
    (other / "metrics" / "dit.jsonl").write_text('{"step": 5000, "loss": 0.25}\n')
    (other / "eval" / "lower rate.json").write_text('{"psnr": 30.5, "trained_psnr": 18.9}')
    (workdir / "eval" / "a <b> run.json").write_text('{"psnr": 20.25, "ssim": 0.5}')
    Image.new("RGB", (64, 32), "blue").save(other / "samples" / "generated_step_5.png")
    _picture_at(workdir, 20, "red")
    output = tmp_path / "pages" / "both.html"
    command = [sys.executable, "-m", "rae_jax.report", f"--workdir={workdir}", f"--workdir={other}"]
    mistake = subprocess.run(command, capture_output=True, text=True)
    assert mistake.returncode == 2 and "--output" in mistake.stderr and mistake.stderr.count("\n") == 1
    subprocess.run([*command, f"--output={output}"], check=True, capture_output=True)
    page = output.read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt; run and lower rate</title>" in page
    assert re.search("<th>psnr<.*?</th><td class=number>20.25</td><td class=number>18.9</td>", page)
    assert re.search("<th>ssim<.*?</th><td class=number>0.5</td><td class=number>–</td>", page)
    assert page.count('alt="generated step 5, ') == 2
    loss = [of_runs for of_runs in series(page) if of_runs[1]["steps"] == [5000]]
    assert len(loss) == 1 and loss[0][0]["steps"][-1] == 2000
    assert "Keys that differ:" in page and "<th>data.path</th>" in page


def test_a_workdir_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rae_jax.report", f"--workdir={tmp_path / 'no'}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir=") and done.stderr.count("\n") == 1
