"""A small Hub for tests: repositories with branches and history, LFS, tokens and faults, for the unmodified client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import torch
import yaml


TOKENS = {"hf_good": "user", "hf_other": "stranger"}
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".tar")


class Repository:
    def __init__(self, private: bool):
        self.private, self.commits, self.branches = private, {}, {}
        self.branches["main"] = self.add({}, "initial commit")

    def add(self, files: dict[str, bytes], message: str) -> str:
        """Stores a commit of whole contents; returns its sha."""
        oid = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """Serves on 127.0.0.1 from construction on; `close` ends it. `uploads_until_death` breaks connections off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploads_until_death: int | None = None
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # broken connections are part of the tests

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._route()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answer(self, status=200, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code=None, message=""):
        headers = {"X-Error-Message": message or code}
        self._answer(status, {"error": message or code}, headers | ({"X-Error-Code": code} if code else {}))

    # -- routes --------------------------------------------------------------------------------------------------------

    def _route(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS and not parts.path.startswith("/lfs/"):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        self.user = TOKENS.get(token)
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, parts.path):
                values = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if "id" in values:
                    repository = self.server.repositories.get(values["id"])
                    owner = values["id"].split("/")[0]
                    if repository is None or (repository.private and self.user != owner):
                        return self._refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
                    writes = self.command in ("POST", "DELETE") and "paths-info" not in self.path
                    if writes and self.user is None:
                        return self._refuse(401, message="Invalid username or password.")
                    if writes and self.user != owner:
                        return self._refuse(403, message="Forbidden: you do not have write access")
                    values["repository"] = repository
                return handler(self, **values)
        return self._refuse(404, message=f"no route {self.command} {parts.path}")

    def _whoami(self):
        if self.user is None:
            return self._refuse(401, message="Invalid username or password.")
        return self._answer(body={"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self):
        wanted = json.loads(self.body)
        if self.user is None:
            return self._refuse(401, message="Invalid username or password.")
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if not name.startswith(f"{self.user}/"):
            return self._refuse(403, message="Forbidden: you cannot create repositories in this namespace")
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            return self._answer(409, {"error": "You already created this repo", "url": url})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[name] = Repository(private)
        return self._answer(body={"url": url, "name": name})

    def _validate(self):
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---", content, re.S)
        try:
            valid = isinstance(yaml.safe_load(front.group(1)), dict) if front else False
        except yaml.YAMLError:
            valid = False
        if not valid:
            return self._answer(400, {"errors": [{"message": "Invalid YAML metadata"}], "warnings": []})
        return self._answer(body={"errors": [], "warnings": []})

    def _info(self, id, repository, rev=None):
        found = repository.at(rev or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        oid, files = found
        body = {"id": id, "modelId": id, "sha": oid, "private": repository.private, "tags": []}
        return self._answer(body=body | {"siblings": [{"rfilename": name} for name in files]})

    def _tree(self, id, repository, rev, path=""):
        found = repository.at(rev)
        if found is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        inside = {name: data for name, data in found[1].items() if name.startswith(f"{path}/") or not path}
        if path and not inside:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        start = len(path) + 1 if path else 0
        if parse_qs(urlsplit(self.path).query).get("recursive") != ["true"]:
            folders = {name[:start] + name[start:].split("/")[0] for name in inside if "/" in name[start:]}
            inside = {name: data for name, data in inside.items() if "/" not in name[start:]}
        else:
            folders = {name[: i + start] for name in inside for i, c in enumerate(name[start:]) if c == "/"}
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return self._answer(body=entries + [_entry(name, data) for name, data in inside.items()])

    def _branch(self, id, repository, rev):
        if rev in repository.branches:
            return self._answer(409, {"error": "Reference already exists"})
        repository.branches[rev] = repository.branches["main"]
        return self._answer(body={})

    def _preupload(self, id, repository, rev):
        found = repository.at(rev)
        if found is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            stored = _entry(name, found[1][name]) if name in found[1] else {}
            oid = stored.get("lfs", stored).get("oid")
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._answer(body={"files": answers})

    def _lfs_batch(self, id, repository):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.lfs:
                known["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(known)
        return self._answer(body={"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid):
        if self.server.uploads_until_death is not None:
            self.server.uploads_until_death -= 1
            if self.server.uploads_until_death < 0:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refuse(400, message="wrong content")
        self.server.lfs[oid] = self.body
        return self._answer()

    def _commit(self, id, repository, rev):
        found = repository.at(rev)
        if found is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        files, message = dict(found[1]), ""
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    return self._refuse(400, message="LFS object is missing")
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                return self._refuse(400, message=f"unknown operation {operation['key']}")
        oid = repository.add(files, message)
        body = {"commitOid": oid, "commitUrl": f"{self.server.endpoint}/{id}/commit/{oid}"}
        if self.query.get("create_pr"):
            number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            rev = f"refs/pr/{number}"
            body["pullRequestUrl"] = f"{self.server.endpoint}/{id}/discussions/{number}"
        repository.branches[rev] = oid
        return self._answer(body=body)

    def _resolve(self, id, repository, rev, path):
        found = repository.at(rev)
        if found is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        oid, files = found
        if path not in files:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        data, entry = files[path], _entry(path, files[path])
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"', "Content-Type": "application/octet-stream"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": len(data)}
        status = 200
        if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(part[1]), int(part[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        return self._answer(status, data, headers)


def _entry(name: str, data: bytes) -> dict:
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


ID = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?:models|datasets)/{ID}"  # one namespace for both
ROUTES = [
    (r"/api/whoami-v2", Handler._whoami),
    (r"/api/repos/create", Handler._create),
    (r"/api/validate-yaml", Handler._validate),
    (API, Handler._info),
    (rf"{API}/revision/(?P<rev>.+)", Handler._info),
    (rf"{API}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", Handler._tree),
    (rf"{API}/branch/(?P<rev>.+)", Handler._branch),
    (rf"{API}/preupload/(?P<rev>.+)", Handler._preupload),
    (rf"{API}/commit/(?P<rev>.+)", Handler._commit),
    (rf"/(?:datasets/)?{ID}\.git/info/lfs/objects/batch", Handler._lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]+)", Handler._lfs_put),
    (rf"/(?:datasets/)?{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler._resolve),
]


def environment(hub, folder, token="hf_good", **more):
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **more,  # sums are equal with equal numbers of threads
    }
    return {**os.environ, **settings}


def connect(monkeypatch, hub, folder, token="hf_good"):
    """Let the client in this process talk to the hub, with an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api
    from transformers.utils import hub as hub_of_transformers

    # Transformers keeps a client of its own from the first request on, with the endpoint of then.
    monkeypatch.setattr(hub_of_transformers, "_hf_api", None, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(api, "endpoint", hub.endpoint)  # functions such as list_repo_tree are methods of this object
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN", token)
