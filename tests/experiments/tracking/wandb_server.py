"""A W&B server on loopback: the part of its HTTP interface that runs and views need."""

from __future__ import annotations

import gzip
import json
import re
import threading
from base64 import b64encode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"


@dataclass
class Stored:
    """What was sent.

    Attributes:
        project: The one project there is.
        runs: By id: the variables of the run's upserts, the later over the earlier.
        files: The paths of what was uploaded.
        views: By id: workspaces and reports, as they were saved last.
        texts: Every request's text.
    """

    project: str = "relock"
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: list[bytes] = field(default_factory=list)


class WandbServer:
    """Answers W&B's libraries; `stored` is what they sent.

    An entity or a project that isn't there is refused as an error in GraphQL's form.
    """

    def __init__(self) -> None:
        self.stored = Stored()
        handler = type("Handler", (_Handler,), {"server_": self})
        self._http = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops answering."""
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        """GraphQL's answer to one document."""
        (name,) = re.findall(r"\b(?:query|mutation)\s+(\w+)", query)[:1] or [""]
        operation = getattr(self, f"_{name[:1].upper()}{name[1:]}", None)
        return operation(values) if operation else {"data": {}}

    def _Viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "dTE=", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"data": {"viewer": {**viewer, "teams": {"edges": []}}}}

    _GetDefaultEntity = _Viewer

    def _UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        if values["entity"] not in (None, ENTITY):
            return {"errors": [{"message": "entity not found"}]}
        said = {key: value for key, value in values.items() if value is not None}
        inserted = values["name"] not in self.stored.runs
        self.stored.runs.setdefault(values["name"], {}).update(said)
        project = {
            "id": "cDE=",
            "name": self.stored.project,
            "entity": {"id": "ZTE=", "name": ENTITY},
        }
        bucket = {
            "id": "cjE=",
            "name": values["name"],
            "displayName": values.get("displayName"),
            "description": None,
            "config": values.get("config"),
            "sweepName": None,
            "historyLineCount": 0,
            "project": project,
        }
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}

    def _CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/{values['run']}/{name}"}
            for name in values["files"]
        ]
        return {"data": {"createRunFiles": {"runID": "cjE=", "uploadHeaders": [], "files": files}}}

    def _ArtifactType(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"project": {"artifact": None}}}

    def _CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        sequence = {"id": "czE=", "latestArtifact": None}
        artifact = {"id": "YTE=", "state": "PENDING", "artifactSequence": sequence}
        return {"data": {"createArtifact": {"artifact": artifact}}}

    def _CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "ZjE=", "uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
        manifest = {"id": "bTE=", "file": file}
        return {"data": {"createArtifactManifest": {"artifactManifest": manifest}}}

    def _CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"commitArtifact": {"artifact": {"id": "YTE=", "digest": ""}}}}

    def _CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "id": "ZjE=",
                "name": file["name"],
                "displayName": file["name"],
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/artifacts/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": "YTE="},
            }
            for file in values["input"]["artifactFiles"]
        ]
        edges = [{"node": node} for node in nodes]
        return {"data": {"createArtifactFiles": {"files": {"edges": edges}}}}

    def _Runs(self, values: dict[str, Any]) -> dict[str, Any]:
        if (values.get("entity"), values.get("project")) != (ENTITY, self.stored.project):
            return {"data": {"project": None}}
        said = json.loads(values["filters"])
        found = [
            name
            for name, run in self.stored.runs.items()
            if run.get("groupName") == said["group"] and run.get("jobType") != "summary"
        ]
        nodes = [
            {
                "id": "cjE=",
                "name": name,
                "displayName": name,
                "state": "finished",
                "tags": [],
                "createdAt": "2026-01-01T00:00:00",
                "heartbeatAt": "2026-01-01T00:00:00",
                "user": {"name": ENTITY, "username": ENTITY},
                "historyKeys": None,
                "sweepName": None,
            }
            for name in found
        ]
        runs = {
            "totalCount": len(found),
            "edges": [{"node": node, "cursor": ""} for node in nodes],
            "pageInfo": {"endCursor": "", "hasNextPage": False},
        }
        project = {"internalId": "42", "runCount": len(found), "readOnly": False, "runs": runs}
        return {"data": {"project": project}}

    def _GetProjects(self, values: dict[str, Any]) -> dict[str, Any]:
        node = {
            "__typename": "Project",
            "id": "cDE=",
            "name": self.stored.project,
            "entityName": ENTITY,
            "createdAt": "2026-01-01T00:00:00",
            "isBenchmark": False,
            "user": None,
        }
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"data": {"models": {"pageInfo": page, "edges": [{"node": node}]}}}

    def _upsert_view(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values.get("id")
        if given and given not in self.stored.views:
            return {"errors": [{"message": "view not found"}]}
        id_ = given or b64encode(f"View:{len(self.stored.views)}".encode()).decode()
        self.stored.views.setdefault(id_, {}).update({**values, "id": id_})
        return {"data": {"upsertView": {"view": self._view(id_), "inserted": not given}}}

    _UpsertView = _UpsertView2 = _upsert_view

    def _view(self, id_: str) -> dict[str, Any]:
        view = self.stored.views[id_]
        project = {"id": "cDE=", "name": self.stored.project, "entityName": ENTITY}
        kept = {key: view[key] for key in ("id", "name", "displayName", "type", "spec")}
        times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        return {**kept, **times, "description": view.get("description"), "project": project}

    def _View(self, values: dict[str, Any]) -> dict[str, Any]:
        found = [
            {"node": self._view(id_)}
            for id_, view in self.stored.views.items()
            if view["name"] == values["viewName"]
        ]
        return {"data": {"project": {"allViews": {"edges": found}}}}

    def _SpecificReport(self, values: dict[str, Any]) -> dict[str, Any]:
        id_ = values["reportId"]
        return {"data": {"view": self._view(id_) if id_ in self.stored.views else None}}


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: WandbServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Nothing is downloaded."""
        self._reply({})

    def do_PUT(self) -> None:
        """A file."""
        self._body()
        self.server_.stored.files.append(self.path.partition("?")[0])
        self._reply({})

    def do_POST(self) -> None:
        """GraphQL, a part of a run's stream, or telemetry."""
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._reply(self.server_.answer(asked["query"], asked.get("variables") or {}))
        else:
            self._reply({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server_.stored.texts.append(body)
        return body

    def _reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
