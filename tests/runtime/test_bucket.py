"""Exclusive creation on gs://, with a server on this machine that keeps objects and preconditions as the store does."""

import concurrent.futures
import http.server
import json
import re
import threading
import urllib.parse

import pytest
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, workdir_lock

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")


class _Store(http.server.BaseHTTPRequestHandler):
    """The few requests of the JSON API that gcsfs makes for small objects."""

    objects, lock = {}, threading.Lock()
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status, value=b"", kind="application/json"):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _described(self, name):
        return {
            "name": name,
            "bucket": "bucket",
            "size": str(len(self.objects[name])),
            "generation": "1",
            "kind": "storage#object",
        }

    def _parts(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        found = re.search(r"/b/bucket/o/(.+)$", url.path)
        return urllib.parse.unquote(found[1]) if found else None, query, url.path

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, query, path = self._parts()
        if "/upload/" not in path:
            return self._answer(404, {})
        boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
        _, description, content, _ = body.split(b"--" + boundary)
        name = json.loads(description.split(b"\n\n", 1)[1])["name"]
        data = content.split(b"\n\n", 1)[1].removesuffix(b"\n")
        with self.lock:
            if query.get("ifGenerationMatch") == "0" and name in self.objects:
                return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            self.objects[name] = data
        return self._answer(200, self._described(name))

    def do_GET(self):
        name, query, _ = self._parts()
        if name is None:
            prefix = query.get("prefix", "")
            items = [self._described(n) for n in sorted(self.objects) if n.startswith(prefix)]
            return self._answer(200, {"kind": "storage#objects", "items": items})
        if name not in self.objects:
            return self._answer(404, {"error": {"code": 404, "message": "No such object"}})
        if query.get("alt") == "media":
            return self._answer(200, self.objects[name], "application/octet-stream")
        return self._answer(200, self._described(name))

    def do_DELETE(self):
        name, _, _ = self._parts()
        self.objects.pop(name, None)
        self._answer(204)


@pytest.fixture
def bucket(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    _Store.objects.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    yield epath.Path("gs://bucket/run")
    server.shutdown()


def test_one_of_many_creates_an_object(bucket):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: atomic_files.create(bucket / "lock.json", f"owner {i}"), range(8)))
    assert won.count(True) == 1 and _Store.objects["run/lock.json"] == f"owner {won.index(True)}".encode()


def test_one_run_gets_a_workdir_in_a_bucket(bucket):
    use = pytest.raises(UserError, match="is in use by process")
    with workdir_lock.hold(bucket), use, workdir_lock.hold(bucket):
        pass
    assert "run/lock.json" not in _Store.objects
