"""What rung asks of the Hugging Face Hub, on 127.0.0.1: the API's page of a model, and its files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS = (".safetensors", ".bin", ".gguf")


@dataclass
class Hub:
    """repositories -> branches -> commits -> files; `asked` says what was requested, in order."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    branches: dict[str, dict[str, str]] = field(default_factory=dict)  # repository -> branch -> commit
    refusing: dict[str, int] = field(default_factory=dict)  # repository -> HTTP status
    lies: dict[str, bytes] = field(default_factory=dict)  # name -> what comes in its place
    breaks: set[str] = field(default_factory=set)  # names whose transfer ends half way
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(json.dumps([repo, *map(repr, sorted(files.items()))]).encode()).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        known = self.branches.get(repo, {})
        return known.get(revision) or (revision if revision in self.commits else None)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
            hub.asked.append(f"{self.command} {'/'.join(path)}")
            api = path[:2] == ["api", "models"]
            repo, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
            if status := hub.refusing.get(repo):
                code = {403: "GatedRepo", 404: "RepoNotFound", 401: "RepoNotFound"}.get(status, "")
                return self.answer(status, b"{}", {"X-Error-Code": code})
            if repo not in hub.branches:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            commit = hub.commit_of(repo, rest[1]) if len(rest) > 1 else hub.branches[repo]["main"]
            if commit is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.page(repo, commit) if api else self.file(commit, "/".join(rest[2:]))

        def page(self, repo: str, commit: str) -> None:
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": "0" * 40}
                | ({"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
                   if name.endswith(LFS) else {})
                for name, content in hub.commits[commit].items()
            ]  # fmt: skip
            self.answer(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

        def file(self, commit: str, name: str) -> None:
            if name not in hub.commits[commit]:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = hub.lies.get(name, hub.commits[commit][name])
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            etag = hashlib.sha1(content).hexdigest()
            self.answer(206 if begin else 200, content[begin:], {"ETag": f'"{etag}"', "X-Repo-Commit": commit},
                        cut=name in hub.breaks)  # fmt: skip

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
