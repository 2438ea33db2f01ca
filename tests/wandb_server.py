"""A stand-in for W&B's server, which answers what the client asks in an online run and in `wandb sync`."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "c0ffee" * 6 + "cafe"


class WandbServer(ThreadingHTTPServer):
    """Keeps what it is sent. While `silent` is set it reads requests and answers none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.silent = False
        self.runs: list[dict[str, Any]] = []
        """Variables of each mutation that begins or changes a run."""
        self.rows: list[dict[str, Any]] = []
        """History, a row for each log."""
        self.versions: dict[tuple[str, str], str] = {}
        """Id of each artefact by its name and the digest of its content."""
        self.logged: list[str] = []
        """Ids of artefacts that a run has given."""
        self.used: list[tuple[str, str]] = []
        """(run, id of the artefact) of each use."""
        self.alerts: list[str] = []
        """Titles."""
        self.files: set[str] = set()
        """Paths of uploads."""
        self.open = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation; empty for those that nobody depends on."""
        asked = given.get("input", given)
        if name == "UpsertBucket":
            self.runs.append(given)
            project = {"id": "p", "name": given["project"] or "rayward", "entity": {"id": "e", "name": "us"}}
            bucket = {"id": "r", "name": given["name"], "displayName": given["displayName"], "project": project}
            return {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}
        if name == "CreateArtifact":
            key = asked["artifactCollectionName"], asked["digest"]
            state = "COMMITTED" if key in self.versions else "PENDING"
            found = self.versions.setdefault(key, f"a{len(self.versions)}")
            return {"artifact": {"id": found, "state": state, "artifactSequence": {"latestArtifact": None}}}
        if name == "CreateArtifactManifest":
            return {"artifactManifest": {"id": "m", "file": self._upload(f"manifest-{asked['artifactID']}")}}
        if name == "CreateArtifactFiles":
            nodes = [
                {**self._upload(file["name"]), "storagePath": None, "artifact": {"id": file["artifactID"]}}
                for file in asked["artifactFiles"]
            ]
            return {"files": {"edges": [{"node": node} for node in nodes]}}
        if name == "CommitArtifact":
            self.logged.append(asked["artifactID"])
            return {"artifact": {"id": asked["artifactID"], "digest": ""}}
        if name == "UseArtifact":
            self.used.append((asked["runName"], asked["artifactID"]))
            return {"artifact": {"id": asked["artifactID"]}}
        if name == "CreateRunFiles":
            files = [{"name": file, **self._upload(file)} for file in asked["files"]]
            return {"runID": "r", "uploadHeaders": [], "files": files}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(asked["title"])
            return {"success": True}
        return {}

    def _upload(self, path: str) -> dict[str, Any]:
        return {"id": path, "uploadUrl": f"{self.url}/upload/{path}", "uploadHeaders": [], "uploadMultipartUrls": None}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may go at any time."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _sent(self) -> WandbServer:
        assert isinstance(self.server, WandbServer)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._sent.files.add(self.path.removeprefix("/upload/"))
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            name = found[1] if found else ""
            answer = self._sent.answer(name, asked.get("variables") or {})
            self._reply({"data": {name[:1].lower() + name[1:]: answer} if answer else {}})
            return
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self._sent.rows += map(json.loads, history.get("content", ()))
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._sent.silent:
            self._sent.open.wait(60)
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve on a free port until the block ends."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.open.set()
        server.shutdown()
        server.server_close()
        thread.join()
