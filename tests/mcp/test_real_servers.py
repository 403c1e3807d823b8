"""Servers that people use, from npm and PyPI: each tool of each is called in a machine, and does what it says."""

import base64
import gzip
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from anyio.from_thread import start_blocking_portal

from luminaguard.errors import ApprovalNeeded
from luminaguard.runtime import Runtime
from luminaguard.runtime.mcp import McpServers
from luminaguard.settings import Folders, load_settings

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.xdist_group("real-servers"), pytest.mark.timeout(240)]
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing: apt-get install npm")
UNREACHABLE = re.compile(
    "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|dns error|onnection refused|error sending request"
)
SCOPE = "@modelcontextprotocol"
FETCH = ("--pypi", "mcp-server-fetch==2026.10.24", "--network", "--", "--allow-private-ips")
W = "/workspace"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")  # fmt: skip


@pytest.fixture
def install(home, tmp_path):
    """Adds a server from a registry; gives the empty folder that it works on."""

    def add(name, registry, package, *words):
        (folder := tmp_path / name).mkdir()
        added = home.run("mcp", "add", name, registry, package, "--folder", str(folder), *words, timeout_s=200)
        if added.code and UNREACHABLE.search(added.err):
            pytest.skip(f"a registry cannot be reached: {added.err[:200]}")
        assert added.code == 0, added.err
        return folder

    return add


@contextmanager
def talking(home, server, *, all_tools=True):
    """A server that is started once: calls a tool for its text; each that it lists must have been called at the end."""
    folders = Folders(*(home.folder / name for name in ("config", "state", "cache", "run"))).ensure()
    called = set()
    with closing(Runtime(load_settings(folders), folders)) as runtime, start_blocking_portal() as portal:
        servers = McpServers(runtime)
        with portal.wrap_async_context_manager(servers.open(server)) as opened:

            def call(tool, *, fails=False, **arguments):
                called.add(tool)
                call.answer = portal.call(servers.call, opened, tool, arguments)
                said = opened.session.in_words(call.answer)
                assert said.failed == fails, said.text
                return said.text

            yield call
            assert not all_tools or called == set(portal.call(opened.session.list_tools))


def let(home, when, *trusted):
    """Write a rule that lets an effect be."""
    with (home.folder / "config" / "luminaguard.toml").open("a") as file:
        file.write(f'[policy]\ntrusted_servers = {json.dumps(trusted)}\n[[policy.rules]]\nname = "mine"\n'
                   f'risk = "GREEN"\nreason = "Mine."\nwhen = {{ {when} }}\n')  # fmt: skip


def waiting(home):
    return [(one["effect"], one["id"]) for one in home.run("approvals", "list", "--json").json["requests"]]


def approve(home, effect):
    """Approve the only thing that waits."""
    ((found, request),) = waiting(home)
    approved = home.run("approvals", "approve", request)
    assert (found, approved.code) == (effect, 0), approved.err


def contents(folder):
    """The bytes of all files in a folder; False for folders."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@needs_npm
def test_files_are_read_and_what_becomes_of_them_waits(home, install):
    folder = install("files", "--npm", f"{SCOPE}/server-filesystem@2026.8.31", "--", W)
    (folder / "a.txt").write_text("one\ntwo\nthree\n")
    (folder / "dot.png").write_bytes(PNG)
    before = contents(folder)
    with talking(home, "files") as call:
        assert call("list_allowed_directories") == f"Allowed directories:\n{W}"
        assert "outside allowed" in call("read_file", path="/etc/passwd", fails=True)
        assert "Successfully" in call("create_directory", path=f"{W}/new/deep")
        assert "Successfully" in call("write_file", path=f"{W}/new/b.txt", content="bee\n")
        assert "\n-two\n+zwei\n" in call("edit_file", path=f"{W}/a.txt", edits=[{"oldText": "two", "newText": "zwei"}])
        assert call("read_file", path=f"{W}/a.txt") == "one\nzwei\nthree\n"
        assert call("read_text_file", path=f"{W}/a.txt", head=2) == "one\nzwei"
        assert call("read_media_file", path=f"{W}/dot.png") == "[image, not shown]"
        assert base64.b64decode(call.answer.content[0].data) == PNG
        both = call("read_multiple_files", paths=[f"{W}/a.txt", f"{W}/new/b.txt"])
        assert "zwei" in both and f"{W}/new/b.txt:\nbee\n" in both
        assert call("list_directory", path=W).split("\n") == ["[FILE] a.txt", "[FILE] dot.png", "[DIR] new"]
        assert "Combined size: 85 B" in call("list_directory_with_sizes", path=W)
        tree = json.loads(call("directory_tree", path=f"{W}/new"))
        assert tree == [{"name": "b.txt", "type": "file"}, {"name": "deep", "type": "directory", "children": []}]
        assert "Successfully" in call("move_file", source=f"{W}/new/b.txt", destination=f"{W}/new/deep/c.txt")
        assert call("search_files", path=W, pattern="**/*.txt") == f"{W}/a.txt\n{W}/new/deep/c.txt"
        assert call("get_file_info", path=f"{W}/a.txt").startswith("size: 15\n")
    assert contents(folder) == before
    approve(home, "changeset")
    after = {"a.txt": b"one\nzwei\nthree\n", "new": False, "new/deep": False, "new/deep/c.txt": b"bee\n"}
    assert contents(folder) == before | after


def call_all_of_everything(call):
    assert call("echo", message="hi ä") == "Echo: hi ä"
    assert "Error: Operation failed" in call("get-annotated-message", messageType="error", includeImage=True)
    assert call.answer.content[0].annotations.priority == 1 and call.answer.content[1].type == "image"
    assert "PATH" in json.loads(call("get-env"))
    assert "2 resource links" in call("get-resource-links", count=2)
    assert [part.type for part in call.answer.content] == ["text", "resource_link", "resource_link"]
    call("get-resource-reference", resourceType="Text", resourceId=3)
    assert call.answer.content[1].resource.text.startswith("Resource 3: This is a plaintext resource")
    call("get-structured-content", location="Chicago")
    assert set(call.answer.structured_content) == {"temperature", "conditions", "humidity"}
    assert call("get-sum", a=2, b=40) == "The sum of 2 and 40 is 42."
    assert "MCP logo" in call("get-tiny-image")
    assert base64.b64decode(call.answer.content[1].data).startswith(PNG[:8])
    call("gzip-file-as-resource", name="a.gz", data="data:text/plain;base64,aGVsbG8=", outputType="resource")
    assert gzip.decompress(base64.b64decode(call.answer.content[0].resource.blob)) == b"hello"
    for tool in ("toggle-simulated-logging", "toggle-subscriber-updates"):
        assert call(tool).startswith("Started simulated") and call(tool).startswith("Stopped simulated")
    assert "Duration: 1 seconds, Steps: 2" in call("trigger-long-running-operation", duration=1, steps=2)
    # It is for clients with the protocol's tasks, an extension that ours has not.
    assert "requires task augmentation" in call("simulate-research-query", topic="bees", fails=True)


@needs_npm
def test_everything_that_a_server_can_answer_comes_back(home, install, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    folder = install("everything", "--npm", f"{SCOPE}/server-everything@2026.8.31")
    with talking(home, "everything") as call:
        call_all_of_everything(call)
        environment = json.loads(call("get-env"))
        assert environment["HOME"] == "/home/user" and "MY_TOKEN" not in environment
    assert contents(folder) == {} and waiting(home) == []
    audited = home.run("mcp", "audit", "everything", "--rebuild", "--json", timeout_s=120)
    assert audited.code == 0, audited.out
    verdicts = {check["name"]: check["verdict"] for check in audited.json["checks"]}
    assert verdicts["reproducible"] == verdicts["set-id"] == verdicts["place"] == "pass"
    layers = home.folder / "data" / "layers"
    assert [path.name for path in layers.iterdir()] == [audited.json["layer"]]
    assert home.run("mcp", "remove", "everything").code == 0 and list(layers.iterdir()) == []


@needs_npm
def test_a_server_that_has_something_under_way_is_made_to_end(home, install):
    install("restless", "--npm", f"{SCOPE}/server-everything@2026.8.31")
    with talking(home, "restless", all_tools=False) as call:
        assert call("toggle-simulated-logging").startswith("Started simulated")


@needs_npm
def test_everything_comes_back_from_a_server_elsewhere_once_it_is_let(home, tmp_path):
    package = f"{SCOPE}/server-everything"
    npm = ("npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", tmp_path, f"{package}@2026.8.31")
    got = subprocess.run(npm, check=False, timeout=200, capture_output=True, text=True)
    if got.returncode and UNREACHABLE.search(got.stderr):
        pytest.skip(f"a registry cannot be reached: {got.stderr[:200]}")
    assert got.returncode == 0, got.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ("env", f"PORT={port}", "node", tmp_path / "node_modules" / package / "dist" / "index.js", "streamableHttp")
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as server, ExitStack() as stack:
        stack.callback(server.kill)
        assert f"listening on port {port}" in server.stderr.readline().decode()
        assert home.run("mcp", "add", "elsewhere", "--url", f"http://127.0.0.1:{port}/mcp").code == 0
        with talking(home, "elsewhere", all_tools=False) as call, pytest.raises(ApprovalNeeded):
            call("get-sum", a=2, b=40)
        approve(home, "call")
        with talking(home, "elsewhere", all_tools=False) as call:
            assert call("get-sum", a=2, b=40) == "The sum of 2 and 40 is 42."
            with pytest.raises(ApprovalNeeded):
                call("get-sum", a=2, b=40)
        let(home, 'effect = "call", server = "elsewhere"', "elsewhere")
        with talking(home, "elsewhere") as call:
            call_all_of_everything(call)


@needs_npm
def test_what_is_remembered_waits_and_is_there_again_once_it_was_approved(home, install):
    folder = install("memory", "--npm", f"{SCOPE}/server-memory@2026.8.31")
    ann = {"name": "Ann", "entityType": "person", "observations": ["likes tea"]}
    bee = {"name": "Bee", "entityType": "animal", "observations": ["flies"]}
    likes, fears = ({"from": "Ann", "to": "Bee", "relationType": name} for name in ("likes", "fears"))
    with talking(home, "memory", all_tools=False) as call:  # it writes beside its code unless a variable says where
        assert "read-only file system" in call("create_entities", entities=[ann], fails=True)
    assert home.run("mcp", "remove", "memory").code == 0 and folder.rmdir() is None
    install("memory", "--npm", f"{SCOPE}/server-memory@2026.8.31", "--env", f"MEMORY_FILE_PATH={W}/memory.jsonl")
    with talking(home, "memory") as call:
        call("create_entities", entities=[ann, bee | {"observations": []}, ann | {"name": "Old"}])
        call("create_relations", relations=[likes, fears])
        call("add_observations", observations=[{"entityName": "Bee", "contents": ["flies", "sings"]}])
        call("delete_observations", deletions=[{"entityName": "Bee", "observations": ["sings"]}])
        call("delete_relations", relations=[fears])
        call("delete_entities", entityNames=["Old"])
        graph = json.loads(call("read_graph"))
        assert graph == {"entities": [ann, bee], "relations": [likes]}
        assert [one["name"] for one in json.loads(call("search_nodes", query="tea"))["entities"]] == ["Ann"]
        assert json.loads(call("open_nodes", names=["Bee"]))["entities"] == [bee]
    assert contents(folder) == {}
    approve(home, "changeset")
    assert list(contents(folder)) == ["memory.jsonl"]
    with talking(home, "memory", all_tools=False) as call:
        assert json.loads(call("read_graph")) == graph
    assert waiting(home) == []


@needs_npm
def test_thoughts_are_counted(home, install):
    install("thinking", "--npm", f"{SCOPE}/server-sequential-thinking@2026.8.31")
    with talking(home, "thinking") as call:
        thought = {"thought": "bees", "totalThoughts": 2, "nextThoughtNeeded": True}
        for number in (1, 2):
            said = json.loads(call("sequentialthinking", thoughtNumber=number, **thought))
            assert said["thoughtHistoryLength"] == number


def git(folder, *words):
    return subprocess.run(("git", "-C", folder, *words), check=True, capture_output=True, text=True, timeout=30).stdout


def test_a_repository_is_worked_on_and_what_becomes_of_it_waits(home, install):
    folder = install("git", "--pypi", "mcp-server-git==2026.10.19")
    (folder / "a.txt").write_text("one\n")
    for words in ("init -qb main", "config user.name Me", "config user.email me@x.org", "add .", "commit -qm first"):
        git(folder, *words.split())
    (folder / "a.txt").write_text("one\ntwo\n")
    before, here = contents(folder), {"repo_path": W}
    with talking(home, "git") as call:
        assert "modified:   a.txt" in call("git_status", **here)
        assert "\n one\n+two" in call("git_diff_unstaged", **here)
        assert "staged successfully" in call("git_add", files=["a.txt"], **here)
        assert "\n one\n+two" in call("git_diff_staged", **here)
        assert "reset" in call("git_reset", **here) and "+two" not in call("git_diff_staged", **here)
        call("git_add", files=["a.txt"], **here)
        commit = call("git_commit", message="second", **here).split()[-1]
        log = call("git_log", **here)
        assert log.index("Message: second") < log.index("Message: first") and "Author: Me" in log
        assert call("git_create_branch", branch_name="side", **here) == "Created branch 'side' from 'main'"
        assert "Switched to branch 'side'" in call("git_checkout", branch_name="side", **here)
        assert call("git_branch", branch_type="local", **here).split() == ["main", "*", "side"]
        assert "\n one\n+two" in call("git_diff", target="HEAD~1", **here)
        assert commit in call("git_show", revision="HEAD", **here)
    assert contents(folder) == before
    approve(home, "changeset")
    assert git(folder, "log", "--format=%H %s", "-1").split() == [commit, "second"]
    assert git(folder, "branch", "--format=%(refname:short)").split() == ["main", "side"]
    assert git(folder, "branch", "--show-current") == "side\n" and git(folder, "status", "--porcelain") == ""
    assert git(folder, "show", "HEAD:a.txt") == "one\ntwo\n" and git(folder, "fsck", "--strict") == ""


def test_the_time_is_that_of_this_machine(home, install):
    install("time", "--pypi", "mcp-server-time==2026.10.19")
    with talking(home, "time") as call:
        before = datetime.now(UTC)
        now = datetime.fromisoformat(json.loads(call("get_current_time", timezone="Asia/Tokyo"))["datetime"])
        assert now.utcoffset() == timedelta(hours=9)
        assert before - timedelta(seconds=2) < now < datetime.now(UTC) + timedelta(seconds=1)
        said = json.loads(call("convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo"))
        assert (said["target"]["datetime"][11:16], said["time_difference"]) == ("21:00", "+9.0h")
        assert "Invalid timezone" in call("get_current_time", timezone="Nowhere/Here", fails=True)


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(404 if self.path == "/robots.txt" else 200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html><body><article><h1>Bees</h1><p>Bees like tea.</p></article></body></html>")


@pytest.fixture
def page():
    with ThreadingHTTPServer(("127.0.0.2", 0), Page) as server:  # 127.0.0.1 is the machine's own
        server.seen, server.url = [], f"http://127.0.0.2:{server.server_port}/page"
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def test_a_page_that_a_rule_lets_is_fetched(home, install, page):
    install("fetch", *FETCH)
    let(home, f'effect = "request", method = ["GET"], host = "127.0.0.2", port = {page.server_port}')
    with talking(home, "fetch") as call:
        assert "# Bees\n\nBees like tea." in call("fetch", url=page.url)
        assert page.seen == ["/robots.txt", "/page"]
        assert "<p>Bees like tea.</p>" in call("fetch", url=page.url, raw=True)
    assert page.seen == ["/robots.txt", "/page"] * 2 and waiting(home) == []


def test_a_page_that_no_rule_lets_is_fetched_once_for_each_approval(home, install, page):
    install("careful", *FETCH, "--ignore-robots-txt")
    with talking(home, "careful") as call:
        assert "403" in call("fetch", url=page.url, fails=True)
    approve(home, "request")
    assert page.seen == []
    with talking(home, "careful") as call:
        assert "Bees like tea." in call("fetch", url=page.url)
        assert "403" in call("fetch", url=page.url, fails=True)
    assert page.seen == ["/page"]
    assert [effect for effect, _ in waiting(home)] == ["request"]


def test_a_database_is_a_file_that_waits(home, install):
    folder = install("sqlite", "--pypi", "mcp-server-sqlite==2025.4.25", "--with", "mcp<2", "--",
                     "--db-path", f"{W}/notes.db")  # fmt: skip
    with talking(home, "sqlite") as call:
        assert call("list_tables") == "[]"
        assert "created" in call("create_table", query="CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)")
        assert "'affected_rows': 2" in call("write_query", query="INSERT INTO notes (text) VALUES ('tea'), ('bee')")
        assert call("read_query", query="SELECT text FROM notes WHERE id > 1") == "[{'text': 'bee'}]"
        assert "Only SELECT" in call("read_query", query="DELETE FROM notes")
        assert call("list_tables") == "[{'name': 'notes'}]"
        assert "'name': 'text', 'type': 'TEXT'" in call("describe_table", table_name="notes")
        assert call("append_insight", insight="bees like tea") == "Insight added to memo"
    assert contents(folder) == {}
    approve(home, "changeset")
    assert list(contents(folder)) == ["notes.db"]
    with closing(sqlite3.connect(folder / "notes.db")) as database:
        assert database.execute("SELECT id, text FROM notes").fetchall() == [(1, "tea"), (2, "bee")]
