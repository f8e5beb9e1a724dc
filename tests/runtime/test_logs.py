"""Lines of metrics: on a bucket they are written by a thread, and none is lost."""

import threading

from etils import epath

from rae_jax.runtime import logs, remote_lines


class _Bucket:
    """An object of a bucket that can be slow or out of reach; keeps every version that was written."""

    def __init__(self):
        self.versions, self.reachable, self.gate, self.asked = [], True, threading.Event(), threading.Event()
        self.gate.set()

    def write_text(self, text):
        self.asked.set()
        self.gate.wait(20)
        if not self.reachable:
            raise OSError("no route to host")
        self.versions.append((threading.current_thread(), text))


def test_the_training_thread_never_waits_for_a_bucket(monkeypatch):
    monkeypatch.setattr(remote_lines, "EVERY", 0.01)
    bucket, said = _Bucket(), []
    bucket.gate.clear()
    lines = remote_lines.RemoteLines(bucket, ["a"], said.append)
    lines.append("b")
    assert bucket.asked.wait(20)  # the write of this line hangs
    for name in "cd":
        lines.append(name)
    assert bucket.versions == []
    bucket.gate.set()
    lines.close()
    writer, first = bucket.versions[0]
    assert first == "a\nb\n" and writer is not threading.current_thread()
    assert bucket.versions[-1][1] == "a\nb\nc\nd\n"
    assert said == [] and len(bucket.versions) <= 2, "not one write a line"


def test_lines_are_kept_until_the_bucket_can_be_reached(monkeypatch):
    monkeypatch.setattr(remote_lines, "EVERY", 3600)
    bucket, said = _Bucket(), []
    bucket.reachable = False
    lines = remote_lines.RemoteLines(bucket, [], said.append)
    lines.append("a")
    lines.flush()
    lines.append("b")
    lines.flush()
    assert len(said) == 1 and "cannot be written (no route to host): training continues" in said[0]
    bucket.reachable = True
    lines.flush()
    assert bucket.versions[-1][1] == "a\nb\n" and "can be written again: no line is lost" in said[1]
    lines.flush()
    assert len(bucket.versions) == 1
    lines._stop.set()


def test_a_missing_evaluation_is_noticed(tmp_path):
    workdir = epath.Path(tmp_path)
    with logs.Metrics(workdir, "toy", step=0) as metrics:
        metrics.write(2, {"loss": 1.0})
        metrics.write(4, {"loss": 1.0})
        metrics.write(4, {"eval/fd": 2.0})
    assert logs.lacks_evaluation(workdir, "toy", 2) and not logs.lacks_evaluation(workdir, "toy", 4)
    assert logs.lacks_evaluation(workdir, "other", 4)
