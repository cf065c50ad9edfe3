"""A W&B server for tests: answers on 127.0.0.1 what a run asks for, and keeps what the run sends.

with Stub() as stub:
    ...  # WANDB_BASE_URL=stub.url
stub.runs["id"].rows
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Run:
    """What the server knows of one run. about: the last value sent of every UpsertBucket variable that was not null."""

    about: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    starts: int = 0
    exit_codes: list[int] = field(default_factory=list)

    @property
    def config(self) -> dict:
        return {k: v["value"] for k, v in json.loads(self.about["config"]).items() if k != "_wandb"}


class Stub(ThreadingHTTPServer):
    """refuse: HTTP status that every GraphQL question is answered with, or 0.

    runs: id -> Run. asked: names of the GraphQL questions. elsewhere: paths that are no part of keeping a run.
    """

    daemon_threads = True

    def __init__(self, refuse: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.runs = refuse, {}
        self.asked, self.elsewhere, self.broken = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.close()
        assert not self.broken, self.broken

    def close(self) -> None:
        """Hang up; from here on the port refuses connections."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(error := sys.exception(), ConnectionError):
            self.broken.append(repr(error))

    def answer(self, query: str, given: dict) -> dict:
        """The `data` of one GraphQL question; what a run does not depend on is answered with nothing."""
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", query)[1]
        self.asked.append(name)
        answers = {"RunResumeStatus": self.status, "UpsertBucket": self.upsert, "CreateRunFiles": self.places}
        return answers[name](given) if name in answers else {}

    def status(self, given: dict) -> dict:
        if not (run := self.runs.get(given["name"])):
            return {"model": None}
        bucket = {
            **self.bucket(given["name"]), "summaryMetrics": json.dumps(run.summary), "logLineCount": 0,
            "eventsLineCount": 0, "historyTail": json.dumps([json.dumps(r) for r in run.rows[-1:]]), "eventsTail": "[]",
            "tags": run.about["tags"], "notes": None, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": "m", "name": given["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def upsert(self, given: dict) -> dict:
        run = self.runs.setdefault(given["name"], Run())
        run.starts += given["groupName"] is not None  # a run says its group when it starts, not when it adds to itself
        run.about |= {k: v for k, v in given.items() if v is not None}
        return {"upsertBucket": {"bucket": self.bucket(given["name"]), "inserted": run.starts == 1}}

    def bucket(self, name: str) -> dict:
        about = self.runs[name].about
        owner = {"id": "p", "name": about["project"], "entity": {"id": "e", "name": about.get("entity", "me")}}
        return {
            "id": name, "name": name, "displayName": about["displayName"], "description": None, "sweepName": None,
            "config": about["config"], "historyLineCount": len(self.runs[name].rows), "project": owner,
        }  # fmt: skip

    def places(self, given: dict) -> dict:
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/{given['run']}/{f}"} for f in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def stream(self, name: str, sent: dict) -> None:
        """One file_stream request: rows from `offset` on, the summary as it now is."""
        run = self.runs[name]
        for file, part in sent.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                run.rows[part["offset"] :] = lines
            if file == "wandb-summary.json":
                run.summary = lines[-1]
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self):
        body = self.body()
        if self.path == "/graphql":
            question = json.loads(body)
            if self.server.refuse:
                return self.reply({"errors": [{"message": "not you"}]}, self.server.refuse)
            return self.reply({"data": self.server.answer(question["query"], question.get("variables") or {})})
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self.server.stream(stream[1], json.loads(body))
        else:
            self.server.elsewhere.append(self.path)
        return self.reply({}, self.server.refuse or 200)

    def do_PUT(self):
        _, _, run, file = self.path.split("/", 3)
        self.server.runs[run].files[file] = self.body()
        self.reply({})

    def body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def reply(self, what: dict, status: int = 200) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
