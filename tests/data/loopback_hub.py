"""A hub on 127.0.0.1 that knows one data set, and what the reader found there, printed as JSON.

A script of its own, since HF_ENDPOINT is read when huggingface_hub is imported (which our modules
do not do before a hub id is opened).
"""

import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastsft.config import DataSource
from fastsft.data.sources import open_source
from fastsft.errors import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
call = {"role": "assistant", "content": None, "tool_calls": calls}
plain = {"role": "assistant", "content": "a"}
rows = [
    {"messages": [{"role": "user", "content": f"q{n}"}, call if n % 2 else plain]} for n in range(5)
]
DATA = "".join(json.dumps(row) + "\n" for row in rows).encode()
seen = []


class Hub(BaseHTTPRequestHandler):
    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0].replace("%40", "@")
        file = {"type": "file", "oid": "ab" * 20, "size": len(DATA), "path": "train.jsonl"}
        known = path.startswith(("/api/datasets/team/chat", "/datasets/team/chat/resolve"))
        if known and "/tree/" in path:
            ok = path.endswith(("/tree/main", "/tree/" + SHA))
            if ok:
                return self.reply(json.dumps([file]).encode())
            return self.reply(b"{}", 404, X_Error_Code="EntryNotFound")
        if known and "/paths-info/" in path:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return self.reply(b"[]")
        if known and path.startswith("/api/"):
            info = {"id": "team/chat", "sha": SHA, "private": False, "gated": False, "tags": []}
            info |= {"downloads": 0, "likes": 0, "siblings": [{"rfilename": "train.jsonl"}]}
            return self.reply(json.dumps(info).encode())
        if known and path.endswith("/train.jsonl"):
            return self.reply(DATA, ETag='"abc"', X_Repo_Commit=SHA)
        code = "EntryNotFound" if known else "RepoNotFound"
        self.reply(b"{}", 404, X_Error_Code=code)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_TOKEN"] = "hf_secret"

out = {}
for streaming in (False, True):
    source = open_source(DataSource(path="team/chat"), system=None, streaming=streaming)
    worker = pickle.loads(pickle.dumps(source))
    out[str(streaming)] = [
        source.verdict,
        source.fingerprint(),
        [[row.where, row.messages] for chunk in source.chunks() for row in worker.parse(chunk)],
        [row.where for chunk in source.chunks(3) for row in worker.parse(chunk)],
    ]
for path, split in (("team/none", None), ("team/chat", "nothing")):
    try:
        open_source(DataSource(path=path, split=split), system=None)
    except UserError as error:
        out[f"{path} {split}"] = str(error)
out["tokens"] = sorted({token for _, token in seen if token})
out["asked"] = len(seen)
print(json.dumps(out))
