"""A small Hub on loopback: what `huggingface_hub` asks of the real one to create a repository and to push a commit."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1; a repository is a folder below `root`, which holds its newest files."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.commits = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802  (the name that http.server calls)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            name = json.loads(body)["name"]
            (self.server.root / "me" / name).mkdir(parents=True, exist_ok=True)
            self.answer({"url": f"{self.server.endpoint}/me/{name}", "id": f"me/{name}"})
        elif parts == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            folder = self.server.root / parts[2] / parts[3]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    path = folder / entry["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
            self.server.commits.append(f"{len(self.server.commits) + 1:040x}")
            oid = self.server.commits[-1]
            self.answer({"commitUrl": f"{self.server.endpoint}/me/{parts[3]}/commit/{oid}", "commitOid": oid})
        else:
            self.answer({"error": f"no such route: {self.path}"}, status=404)

    def do_GET(self):  # noqa: N802
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            self.answer({"name": "me", "type": "user", "orgs": []})
        elif parts[:2] == ["api", "models"] and (self.server.root / parts[2] / parts[3]).is_dir():
            names = [path.name for path in (self.server.root / parts[2] / parts[3]).iterdir()]
            self.answer(
                {"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": [{"rfilename": name} for name in names]}
            )
        else:
            self.answer({"error": f"no such route: {self.path}"}, status=404)

    def do_HEAD(self):  # noqa: N802
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def answer(self, payload: dict, status: int = 200):
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silent: pytest shows what a test prints."""
