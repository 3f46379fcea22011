"""data/download_fineweb.py against an HTTP server on loopback that speaks the hub's API."""

import hashlib
import json
import logging
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("huggingface_hub")

from data import download_fineweb

REPO, COMMIT = "someone/export", "c0ffee" * 6 + "beef"
FOLDER = "datasets/fineweb10B_sp1024"


def shard(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + (np.arange(tokens) % 1024).astype("<u2").tobytes()


def export_files() -> dict[str, bytes]:
    manifest = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1, "tokens_val": 50_000},
            }
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {f"{FOLDER}/fineweb_train_{i:06d}.bin": shard(200_000 + i) for i in range(3)}
    files[f"{FOLDER}/fineweb_val_000000.bin"] = shard(50_000)
    files["tokenizers/fineweb_1024_bpe.model"] = b"a tokenizer"
    files["manifest.json"] = json.dumps(manifest).encode()
    return {f"datasets/{path}": data for path, data in files.items()}


class FakeHub:
    """Serves `files` on loopback, and does the damage it is told to."""

    def __init__(self):
        self.files = export_files()
        self.token = None  # if set, only requests that carry it are answered
        self.status = None  # if set, what every request for a file is answered with
        self.corrupt = {}  # path -> how many more times a byte of it arrives changed
        self.sent = []  # paths of the transfers
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, code):
        self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def allowed(self):
        if self.hub.token in (None, self.headers.get("Authorization", "").split(" ")[-1]):
            return True
        self.error(401, "RepoNotFound")
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path)
        if not self.allowed():
            return
        if path == f"/api/datasets/{REPO}/revision/main":
            info = {"id": REPO, "sha": COMMIT, "private": False, "tags": [], "siblings": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/datasets/{REPO}/tree/{COMMIT}/"):
            self.tree(path.split(f"{COMMIT}/", 1)[1].split("?")[0])
        elif path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self.resolve(path.split(f"{COMMIT}/", 1)[1])
        elif path.startswith(f"/api/datasets/{REPO}/revision/"):
            self.error(404, "RevisionNotFound")
        else:
            self.error(404, "RepoNotFound")

    def tree(self, folder):
        found = []
        for path, data in self.hub.files.items():
            if not path.startswith(f"{folder}/"):
                continue
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": path, "size": len(data), "oid": git}
            if not path.endswith(".json"):
                sha = hashlib.sha256(data).hexdigest()
                entry |= {"oid": "0" * 40, "lfs": {"oid": sha, "size": len(data), "pointerSize": 9}}
            found.append(entry)
        if found:
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        else:
            self.error(404, "EntryNotFound")

    def resolve(self, path):
        if self.hub.status:
            self.error(self.hub.status, "Trouble")
        elif path not in self.hub.files:
            self.error(404, "EntryNotFound")
        else:
            data = self.hub.files[path]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if self.command == "GET":
                self.hub.sent.append(path)
                if self.hub.corrupt.get(path, 0) > 0:
                    self.hub.corrupt[path] -= 1
                    data = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
            self.answer(200, data, **headers)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])
    fake = FakeHub()
    yield fake
    fake.close()


@pytest.fixture
def download(server, tmp_path):
    def run(*flags, endpoint=None):
        places = ["--data-dir", str(tmp_path / "data"), "--endpoint", endpoint or server.url]
        return download_fineweb.main(["--repo-id", REPO, *places, *flags])

    return run


def local_files(tmp_path):
    data, passing = tmp_path / "data", {"cache", ".download"}
    files = (p for p in data.rglob("*") if p.is_file() and passing.isdisjoint(p.parts))
    return {str(p.relative_to(data)): p.read_bytes() for p in files}


def expected(server, train_shards):
    names = [f"{FOLDER}/fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    names += [f"{FOLDER}/fineweb_val_000000.bin", "tokenizers/fineweb_1024_bpe.model"]
    return {name: server.files[f"datasets/{name}"] for name in [*names, "manifest.json"]}


def test_gets_what_was_asked_for_and_then_only_what_is_missing(server, download, tmp_path, capsys):
    assert download("--train-shards", "1") == 0
    assert local_files(tmp_path) == expected(server, 1)
    assert "val: 1 shards, 50,000 tokens" in capsys.readouterr().out
    server.sent.clear()
    assert download("--train-shards", "3") == 0
    assert local_files(tmp_path) == expected(server, 3)
    new = {f"datasets/{FOLDER}/fineweb_train_{i:06d}.bin" for i in (1, 2)}
    assert set(server.sent) == {*new, "datasets/manifest.json"}


def test_a_corrupted_shard_is_fetched_again_or_never_shown(server, download, tmp_path, capsys):
    name = f"{FOLDER}/fineweb_train_000001.bin"
    server.corrupt[f"datasets/{name}"] = 99
    assert download("--train-shards", "3") == 2
    assert f"{name} arrived broken" in capsys.readouterr().err
    assert name not in local_files(tmp_path)
    server.corrupt[f"datasets/{name}"] = 1
    assert download("--train-shards", "3") == 0
    assert local_files(tmp_path) == expected(server, 3)


def test_verify_replaces_what_changed_on_disk(server, download, tmp_path):
    assert download("--train-shards", "1") == 0
    path = tmp_path / "data" / FOLDER / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert download("--train-shards", "1") == 0  # the size is right: not looked at
    assert local_files(tmp_path) != expected(server, 1)
    assert download("--train-shards", "1", "--verify") == 0
    assert local_files(tmp_path) == expected(server, 1)


def test_token_opens_a_private_repository(server, download, monkeypatch, capsys):
    server.token = "hf_secret"
    assert download("--train-shards", "1") == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download("--train-shards", "1") == 0


def change_manifest(server, change):
    manifest = json.loads(server.files["datasets/manifest.json"])
    change(manifest)
    server.files["datasets/manifest.json"] = json.dumps(manifest).encode()


def test_says_what_is_wrong(server, download, tmp_path, monkeypatch, capsys):
    def fails(word, *flags, **options):
        assert download("--train-shards", "1", *flags, **options) == 2
        assert word in capsys.readouterr().err
        assert local_files(tmp_path).keys() <= {"manifest.json"}

    fails("check the network", endpoint="http://127.0.0.1:9")
    fails("--repo-id", "--repo-id", "no/such")
    fails("--revision", "--revision", "no-such")
    fails("--remote-root", "--remote-root", "elsewhere")
    fails("has 0 of fineweb10B_sp9", "--variant", "sp9")
    fails("the repository has 3", "--train-shards", "4")
    server.status = 403
    fails("403")
    server.status = None
    change_manifest(
        server, lambda m: m["tokenizers"][0].update(model_path="tokenizers/../../escape")
    )
    fails("outside tokenizers/")
    change_manifest(server, lambda m: m["datasets"][0].pop("tokenizer_name"))
    fails("in the known form")
    server.files["datasets/manifest.json"] = b"not json"
    fails("not valid JSON")


def test_refuses_a_changed_export_a_full_disk_and_a_shard_that_is_none(
    server, download, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 300 << 20})
        patch.setattr(download_fineweb.shutil, "disk_usage", lambda _: usage)
        patch.setattr(download_fineweb, "FREE_BYTES_KEPT", 300 << 20)
        assert download("--train-shards", "1") == 2
        assert "GB free" in capsys.readouterr().err
    assert download("--train-shards", "1") == 0
    change_manifest(server, lambda m: m["datasets"][0]["stats"].update(files_train=4))
    assert download("--train-shards", "2") == 2
    assert "must not mix" in capsys.readouterr().err
    assert local_files(tmp_path).keys() == expected(server, 1).keys()
    server.files = export_files()
    name = f"{FOLDER}/fineweb_train_000001.bin"
    server.files[f"datasets/{name}"] = b"not a shard" * 1000
    assert download("--train-shards", "2") == 2
    assert "instead of [20240520" in capsys.readouterr().err
    assert name not in local_files(tmp_path)
