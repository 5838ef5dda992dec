"""A small Hub on the loopback interface, in memory: enough of its API for the ordinary client to create, push and load.

    python tests/hub/loopback_hub.py        prints its address, then serves until it is ended

Who sends the token TOKEN is the user `tester` and may write; everybody else may read what is not private. A POST of
{"what": times} to /_faults makes it misbehave so many times: "lfs_500" and "commit_500" answer 500, "lfs_drop" and
"commit_drop" break the connection.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_loopback", "tester"
LFS = (".safetensors", ".parquet", ".bin", ".pt", ".pth")

lock = threading.Lock()
repos: dict[str, dict] = {}  # id -> {"private": bool, "commits": [(sha, {path: bytes})]}
objects: dict[str, bytes] = {}  # LFS content by sha256
faults: Counter = Counter()


def yaml_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, by huggingface_hub's own reading of it."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(content).data
    except Exception as error:  # whatever it is, it is told to the client
        return [f"{type(error).__name__}: {error}"]
    return [] if data.to_dict() else ["empty or missing yaml metadata in repo card"]


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    # answering

    def answer(self, status=200, value=None, content=None, **headers):
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def misbehaves(self, what: str) -> bool:
        """Answer 500 or break the connection, if that was asked for."""
        with lock:
            kind = next((k for k in (f"{what}_500", f"{what}_drop") if faults[k] > 0), None)
            if kind is None:
                return False
            faults[kind] -= 1
        if kind.endswith("_500"):
            self.refuse(500, "InternalServerError", "try again")
        else:
            self.close_connection = True
            self.connection.close()
        return True

    # what there is

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str) -> dict | None:
        """The repository if it may be seen; else it was refused."""
        repo = repos.get(name)
        if repo is None or (repo["private"] and not self.allowed):
            self.refuse(401 if not self.allowed else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def commit(self, repo: dict, revision: str) -> tuple[str, dict] | None:
        if revision == "main":
            return repo["commits"][-1]
        found = next((commit for commit in repo["commits"] if commit[0] == revision), None)
        if found is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return found

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            if not self.allowed:
                return self.refuse(401, "", "Invalid username or password.")
            return self.answer(value={"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            name, kind, revision = match.groups()
            if (repo := self.repo(name)) and (commit := self.commit(repo, revision or "main")):
                sha, files = commit
                if kind == "tree":
                    return self.answer(value=[{"type": "file", "path": p, **about(c, p)} for p, c in files.items()])
                siblings = [{"rfilename": p, "size": len(content)} for p, content in files.items()]
                info = {"id": name, "modelId": name, "sha": sha, "private": repo["private"], "tags": []}
                self.answer(value={**info, "siblings": siblings})
            return None
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            if (repo := self.repo(name)) and (commit := self.commit(repo, revision)):
                sha, files = commit
                if file not in files:
                    headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": sha}
                    return self.answer(404, {"error": "Entry not found"}, **headers)
                etag = f'"{about(files[file], file)["oid"]}"'
                kind = "application/octet-stream"
                self.answer(content=files[file], ETag=etag, X_Repo_Commit=sha, Content_Type=kind)
            return None
        return self.refuse(404, "", f"this Hub does not know {path}")

    do_HEAD = do_GET

    def do_PUT(self):
        oid, content = self.path.rpartition("/")[2], self.body()
        if self.misbehaves("lfs"):
            return None
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "", "content and oid differ")
        objects[oid] = content
        return self.answer(value={})

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/_faults":
            with lock:
                faults.clear()
                faults.update(json.loads(body))
            return self.answer(value={})
        if path == "/api/validate-yaml":
            errors = yaml_errors(json.loads(body)["content"])
            value = {"errors": [{"message": message} for message in errors], "warnings": []}
            return self.answer(400 if errors else 200, value)
        if not self.allowed:
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or USER}/{wanted['name']}"
            url = f"{address()}/{name}"
            private = wanted.get("private") or wanted.get("visibility") == "private"  # older and newer clients
            with lock:
                if name in repos:
                    return self.answer(409, {"error": "You already created this model repo", "url": url})
                first = hashlib.sha1(name.encode()).hexdigest()
                repos[name] = {"private": private, "commits": [(first, {})]}
            return self.answer(value={"url": url, "name": name, "id": name})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            href = {o["oid"]: f"{address()}/_lfs/{o['oid']}" for o in json.loads(body)["objects"]}
            actions = [
                {**o, **({} if o["oid"] in objects else {"actions": {"upload": {"href": href[o["oid"]]}}})}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(value={"transfer": "basic", "objects": actions})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            name, kind, revision = match.groups()
            if (repo := self.repo(name)) is None or self.commit(repo, revision) is None:
                return None
            if kind == "preupload":
                held = repo["commits"][-1][1]
                return self.answer(value={"files": [mode(file, held) for file in json.loads(body)["files"]]})
            if self.misbehaves("commit"):
                return None
            return self.take(name, repo, [json.loads(line) for line in body.splitlines()])
        return self.refuse(404, "", f"this Hub does not know {path}")

    def take(self, name: str, repo: dict, lines: list[dict]):
        """A commit: all of it, or none."""
        with lock:
            files = dict(repo["commits"][-1][1])
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in objects:
                        return self.refuse(400, "", f"{value['path']} was never uploaded")
                    files[value["path"]] = objects[value["oid"]]
                elif key == "deletedFile":
                    files.pop(value["path"], None)
            sha = hashlib.sha1(f"{name}{len(repo['commits'])}".encode()).hexdigest()
            repo["commits"].append((sha, files))
        return self.answer(value={"success": True, "commitOid": sha, "commitUrl": f"{address()}/{name}/commit/{sha}"})


def about(content: bytes, path: str) -> dict:
    sha = hashlib.sha256(content).hexdigest()
    lfs = {"lfs": {"oid": sha, "size": len(content), "pointerSize": 134}} if path.endswith(LFS) else {}
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"oid": sha if lfs else git, "size": len(content), **lfs}


def mode(file: dict, held: dict) -> dict:
    path = file["path"]
    oid = about(held[path], path)["oid"] if path in held else None
    return {"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False, "oid": oid}


def address() -> str:
    return f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    print(address(), flush=True)
    server.serve_forever()
