"""
A small Hub on loopback: what `huggingface_hub`, `transformers`, `datasets` and `evaluate` ask of the real one, over
real HTTP, with faults on request. Repositories of models, datasets and Spaces with their commits, branches and tags,
uploads by LFS, and collections; all of it in memory. What it does not have: Xet (set `HF_HUB_DISABLE_XET=1`), uploads
in several parts, pull requests, and everything that is not about files.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash


TOKEN = "hf_a_token_that_nobody_may_read"
OTHER_TOKEN = "hf_the_token_of_another_user"
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".png", ".bin", ".pt", ".pth")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """The files at one commit, by path, and what the commit said."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits of one repository, oldest first, and the names that point to them."""

    kind: str  # models, datasets, spaces
    id: str
    private: bool
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.kind} {self.id} {branch} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, parent, title, files))
        self.branches[branch] = oid
        return self.commits[-1]

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def files(self) -> dict[str, bytes]:
        """What stands on main."""
        return self.find("main").files


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: re.Pattern
    times: int
    status: int | None = None  # answered instead
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # the connection, in the middle of the request's body
    lose_answer: bool = False  # what is asked is done, and the connection cut before the answer
    before: Callable[[], Any] | None = None  # called first, and the request answered as ever


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1. `me` owns `TOKEN` and belongs to the organization `lab`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = {TOKEN: ("me", ["lab"]), OTHER_TOKEN: ("someone", [])}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, status; 0 where the connection was cut
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def fail(self, method: str, path: str, times: int = 1, **what):
        """Makes the next requests of `method` whose path matches the regular expression go wrong; see `Fault`."""
        self.faults.append(Fault(method, re.compile(path), times, **what))

    def count(self, method: str, path: str) -> int:
        """Requests so far that were answered well."""
        return sum(m == method and re.search(path, p) is not None and 0 < s < 400 for m, p, s in self.requests)

    def repository(self, id: str, kind: str = "models") -> Repository:
        return self.repositories[kind, id]


def read_from(server: HubServer, patch: pytest.MonkeyPatch, cache: Path):
    """Makes a server the Hub that this process reads from, into a cache of its own."""
    for name, value in (("ENDPOINT", server.endpoint), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
        patch.setattr(constants, name, value)
    # the client that transformers keeps has the address of the Hub that was there when it was made
    patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


class _Answer(Exception):
    """An answer that ends the handling of a request."""

    def __init__(self, status: int, payload: Any = None, **headers: str):
        self.status, self.payload = status, payload
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _not_found(code: str) -> _Answer:
    return _Answer(404, {"error": code}, X_Error_Code=code)


class _Handler(BaseHTTPRequestHandler):
    def handle_request(self):
        url = urlsplit(self.path)
        # the slash inside a quoted revision is none of the path's
        path, self.query = url.path, {name: values[-1] for name, values in parse_qs(url.query).items()}
        fault = self.take_fault(path)
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.cut:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.cut(path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if fault is not None and fault.status is not None:
                raise _Answer(fault.status, {"error": "a fault on request"}, **fault.headers)
            for method, pattern, handler in _ROUTES:
                match = pattern.fullmatch(path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    with self.server.lock:
                        handler(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
            raise _Answer(404, {"error": f"no such route: {self.command} {path}"})
        except _Answer as answer:
            if fault is not None and fault.lose_answer:
                return self.cut(path)
            self.answer(path, answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

    def take_fault(self, path: str) -> Fault | None:
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times > 0 and fault.method == self.command and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def cut(self, path: str):
        self.server.requests.append((self.command, path, 0))
        self.close_connection = True

    def answer(self, path: str, answer: _Answer):
        body = answer.payload if isinstance(answer.payload, bytes) else json.dumps(answer.payload).encode()
        self.server.requests.append((self.command, path, answer.status))
        self.send_response(answer.status)
        if not isinstance(answer.payload, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Silent: pytest shows what a test prints."""

    # ---- who asks

    @property
    def owned(self) -> list[str]:
        """Namespaces that the token may write to."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name, organizations = self.server.users.get(token, (None, []))
        return [name, *organizations] if name else []

    def check_writable(self, namespace: str):
        if not self.owned:
            raise _Answer(401, {"error": "Invalid credentials"})
        if namespace not in self.owned:
            raise _Answer(403, {"error": f"no right to write to {namespace}"}, X_Error_Message="no write access")

    def repo(self, kind: str, id: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get((kind, id))
        if repository is None or repository.private and id.split("/")[0] not in self.owned:
            raise _not_found("RepoNotFound")
        if write:
            self.check_writable(id.split("/")[0])
        return repository

    def commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise _not_found("RevisionNotFound")
        return commit

    def whoami(self):
        if not self.owned:
            raise _Answer(401, {"error": "Invalid user token."}, X_Error_Message="Invalid user token.")
        name, *organizations = self.owned
        raise _Answer(200, {"type": "user", "name": name, "orgs": [{"name": other} for other in organizations]})

    # ---- repositories

    def create(self):
        asked = json.loads(self.body)
        namespace = asked.get("organization") or (self.owned or [""])[0]
        self.check_writable(namespace)
        kind, id = f"{asked.get('type') or 'model'}s", f"{namespace}/{asked['name']}"
        answer = {"id": id, "url": f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{id}"}
        if (kind, id) in self.server.repositories:
            raise _Answer(409, {"error": "You already created this repo", **answer})
        private = asked.get("visibility") == "private"
        repository = self.server.repositories[kind, id] = Repository(kind, id, private, asked.get("sdk"))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit("main", "initial commit", {".gitattributes": attributes.encode()})
        raise _Answer(200, answer)

    def info(self, kind: str, id: str, revision: str):
        repository = self.repo(kind, id)
        commit = self.commit(repository, revision or "main")
        blobs = "blobs" in self.query
        siblings = [
            {"rfilename": path, **({"size": len(data)} if blobs else {})} for path, data in commit.files.items()
        ]
        details = {"sha": commit.oid, "private": repository.private, "siblings": siblings, "sdk": repository.sdk}
        raise _Answer(200, {"id": id, "lastModified": DATE, "tags": [], "downloads": 0, "likes": 0, **details})

    def refs(self, kind: str, id: str):
        repository = self.repo(kind, id)
        refs = {
            key: [{"name": name, "ref": f"refs/{part}/{name}", "targetCommit": oid} for name, oid in named.items()]
            for key, part, named in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        raise _Answer(200, {**refs, "converts": []})

    def history(self, kind: str, id: str, revision: str):
        repository = self.repo(kind, id)
        commit, listed = self.commit(repository, revision), []
        while commit is not None:
            listed.append({"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": []})
            commit = repository.find(commit.parent) if commit.parent else None
        raise _Answer(200, listed)

    def branch(self, kind: str, id: str, name: str):
        start = json.loads(self.body or "{}").get("startingPoint", "main")
        self._name(self.repo(kind, id, write=True), "branches", name, start)

    def tag(self, kind: str, id: str, revision: str):
        self._name(self.repo(kind, id, write=True), "tags", json.loads(self.body)["tag"], revision)

    def _name(self, repository: Repository, part: str, name: str, start: str):
        names = getattr(repository, part)
        if name in names:
            raise _Answer(409, {"error": f"{name} exists"})
        names[name] = self.commit(repository, start).oid
        raise _Answer(200, {})

    # ---- reading

    def resolve(self, kind: str, id: str, revision: str, path: str):
        commit = self.commit(self.repo(kind or "models", id), revision)
        if path not in commit.files:
            raise _Answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        data = commit.files[path]
        oid = hashlib.sha256(data).hexdigest() if _is_lfs(path, data) else git_hash(data)
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            raise _Answer(200, data, **headers)
        first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            raise _Answer(416, {}, Content_Range=f"bytes */{len(data)}")
        raise _Answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    def tree(self, kind: str, id: str, revision: str, path: str):
        commit = self.commit(self.repo(kind, id), revision)
        entries = self.entries(commit, path.strip("/"), self.query.get("recursive", "").lower() == "true")
        if path and not entries:
            raise _not_found("EntryNotFound")
        raise _Answer(200, entries)

    def paths_info(self, kind: str, id: str, revision: str):
        commit = self.commit(self.repo(kind, id), revision)
        form = parse_qs(self.body.decode())
        self.query["expand"] = form.get("expand", ["false"])[0]
        everything = {entry["path"]: entry for entry in self.entries(commit, "", True)}
        raise _Answer(200, [everything[path] for path in form.get("paths", []) if path in everything])

    def entries(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": DATE}}
        expand = last if self.query.get("expand", "").lower() in ("true", "1") else {}
        for path, data in sorted(commit.files.items()):
            parents = path.split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                name = "/".join(parents[:depth])
                found[name] = {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name, **expand}
            entry = {"type": "file", "oid": git_hash(data), "size": len(data), "path": path, **expand}
            if _is_lfs(path, data):
                oid = hashlib.sha256(data).hexdigest()
                entry |= {"oid": git_hash(oid.encode()), "lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
            found[path] = entry
        prefix = f"{folder}/" if folder else ""
        below = [entry for path, entry in found.items() if path.startswith(prefix)]
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]

    # ---- writing

    def validate_yaml(self):
        """The real Hub looks closer; here the metadata must be YAML, and its model-index must be complete."""
        text = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else {}
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"]
                    [(metric["type"], float(metric["value"])) for metric in result["metrics"]]
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise _Answer(400, {"errors": [{"message": str(error)}], "warnings": []}) from None
        raise _Answer(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, revision: str):
        commit = self.commit(self.repo(kind, id, write=True), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, data = file["path"], commit.files.get(file["path"])
            mode = "lfs" if _is_lfs(path, None) or file["size"] > 10 * 2**20 else "regular"
            known = {}
            if data is not None:
                known["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else git_hash(data)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        raise _Answer(200, {"files": files})

    def lfs_batch(self, kind: str, id: str):
        self.repo(kind or "models", id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.server.lfs:
                asked["actions"] = {
                    "upload": {"href": f"{self.server.endpoint}/lfs/{asked['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.endpoint}/lfs-verify", "header": {}},
                }
            objects.append(asked)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, {"error": "the content does not have this hash"})
        self.server.lfs[oid] = self.body
        raise _Answer(200, {}, ETag=f'"{oid}"')

    def lfs_verify(self):
        asked = json.loads(self.body)
        whole = len(self.server.lfs.get(asked["oid"], b"")) == asked["size"]
        raise _Answer(200 if whole else 404, {})

    def push(self, kind: str, id: str, revision: str):
        repository = self.repo(kind, id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if revision not in repository.branches:
            raise _not_found("RevisionNotFound")
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.find(revision).files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    raise _Answer(400, {"error": f"no upload of {value['path']}"})
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(404, {"error": "A file with this name doesn't exist"}, X_Error_Code="EntryNotFound")
            elif key == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        commit = repository.commit(revision, header["summary"], files)
        url = f"{self.server.endpoint}/{'' if kind == 'models' else kind + '/'}{id}/commit/{commit.oid}"
        raise _Answer(200, {"commitUrl": url, "commitOid": commit.oid})

    # ---- collections

    def list_collections(self):
        owner = self.query.get("owner")
        shown = [c for c in self.server.collections.values() if owner in (None, c["owner"]["name"])]
        seen = [c for c in shown if not c["private"] or c["owner"]["name"] in self.owned]
        # as on the real Hub, a list shows the first four items only, and leaves the position to the client
        brief = [{**{key: c[key] for key in c if key != "position"}, "items": c["items"][:4]} for c in seen]
        raise _Answer(200, brief)

    def create_collection(self):
        asked = json.loads(self.body)
        self.check_writable(asked["namespace"])
        words = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        slug = f"{asked['namespace']}/{words}-{hashlib.sha1(words.encode()).hexdigest()[:24]}"
        if slug in self.server.collections:
            raise _Answer(409, {"error": "the collection exists", "slug": slug})
        named = {"slug": slug, "title": asked["title"], "description": asked.get("description")}
        owned = {"owner": {"name": asked["namespace"]}, "private": asked.get("private", False), "items": []}
        decorated = {"lastUpdated": DATE, "position": 0, "theme": "blue", "upvotes": 0}
        self.server.collections[slug] = {**named, **owned, **decorated}
        raise _Answer(200, self.server.collections[slug])

    def collection(self, slug: str, write: bool = False) -> dict[str, Any]:
        collection = self.server.collections.get(slug)
        if collection is None:
            raise _Answer(404, {"error": "no such collection"})
        if write:
            self.check_writable(slug.split("/")[0])
        return collection

    def get_collection(self, slug: str):
        raise _Answer(200, self.collection(slug))

    def add_item(self, slug: str):
        asked, collection = json.loads(self.body), self.collection(slug, write=True)
        item, items = asked["item"], collection["items"]
        if any((other["id"], other["type"]) == (item["id"], item["type"]) for other in items):
            raise _Answer(409, {"error": "the item is in the collection"})
        if item["type"] != "paper" and (f"{item['type']}s", item["id"]) not in self.server.repositories:
            raise _Answer(404, {"error": "no such item"})
        note = {"text": asked["note"]} if asked.get("note") else None
        items.append({"_id": f"item-{len(items)}", **item, "position": len(items), "note": note})
        raise _Answer(200, collection)

    def update_item(self, slug: str, item: str):
        asked, items = json.loads(self.body), self.collection(slug, write=True)["items"]
        found = next(other for other in items if other["_id"] == item)
        if "note" in asked:
            found["note"] = {"text": asked["note"]}
        if "position" in asked:
            items.remove(found)
            items.insert(asked["position"], found)
            for position, other in enumerate(items):
                other["position"] = position
        raise _Answer(200, {})


def _is_lfs(path: str, data: bytes | None) -> bool:
    return path.endswith(LFS_SUFFIXES) or data is not None and len(data) > 10 * 2**20


def _route(method: str, path: str, handler: Callable) -> tuple[str, re.Pattern, Callable]:
    parts = {
        "KIND": r"(?P<kind>models|datasets|spaces)",
        "ID": r"(?P<id>[^/]+/[^/]+)",
        "REVISION": r"(?P<revision>[^/]+)",
        "PATH": r"(?P<path>.+)",
        "SLUG": r"(?P<slug>[^/]+/[^/]+)",
    }
    for name, pattern in parts.items():
        path = path.replace(name, pattern)
    return method, re.compile(path), handler


_ROUTES = [
    _route("GET", "/api/whoami-v2", _Handler.whoami),
    _route("POST", "/api/validate-yaml", _Handler.validate_yaml),
    _route("POST", "/api/repos/create", _Handler.create),
    _route("GET", "/api/KIND/ID(/revision/REVISION)?", _Handler.info),
    _route("GET", "/api/KIND/ID/refs", _Handler.refs),
    _route("GET", "/api/KIND/ID/commits/REVISION", _Handler.history),
    _route("GET", "/api/KIND/ID/tree/REVISION(?P<path>/.*)?", _Handler.tree),
    _route("POST", "/api/KIND/ID/paths-info/REVISION", _Handler.paths_info),
    _route("POST", "/api/KIND/ID/branch/(?P<name>[^/]+)", _Handler.branch),
    _route("POST", "/api/KIND/ID/tag/REVISION", _Handler.tag),
    _route("POST", "/api/KIND/ID/preupload/REVISION", _Handler.preupload),
    _route("POST", "/api/KIND/ID/commit/REVISION", _Handler.push),
    _route("POST", "/((?P<kind>datasets|spaces)/)?ID.git/info/lfs/objects/batch", _Handler.lfs_batch),
    _route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    _route("POST", "/lfs-verify", _Handler.lfs_verify),
    _route("GET", "/api/collections", _Handler.list_collections),
    _route("POST", "/api/collections", _Handler.create_collection),
    _route("GET", "/api/collections/SLUG", _Handler.get_collection),
    _route("POST", "/api/collections/SLUG/items", _Handler.add_item),
    _route("PATCH", "/api/collections/SLUG/items/(?P<item>[^/]+)", _Handler.update_item),
    _route("GET", "/((?P<kind>datasets|spaces)/)?ID/resolve/REVISION/PATH", _Handler.resolve),
]
