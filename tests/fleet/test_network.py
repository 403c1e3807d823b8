"""Hosts with addresses of their own, in network namespaces, and a database that speaks TLS and asks for passwords."""

import json
import os
import shutil
import subprocess
import time
from collections import Counter

import psycopg
import pytest
from fleet_hosts import LEASE_S, see_through, until
from test_chaos import EXPECTED

from luminaguard.errors import SettingsError, StorageError
from luminaguard.storage.database import Database
from luminaguard.testing.postgres import find_postgres, running_postgres


class Network:
    """A bridge of this machine, and namespaces that are connected to it."""

    def __init__(self):
        number = os.getpid() % 200 + 20
        self.bridge, self.net = f"lgb{os.getpid() % 100000}", f"10.77.{number}"
        self.address = f"{self.net}.1"
        self.spaces = []
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def space(self):
        """A namespace; what a command in it begins with."""
        number = len(self.spaces)
        name, outside = f"{self.bridge}n{number}", f"{self.bridge}v{number}"
        ip("netns", "add", name)
        self.spaces.append(name)
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", outside, "master", self.bridge, "up")
        ip("-n", name, "addr", "add", f"{self.net}.{number + 10}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        return ["ip", "netns", "exec", name]

    def cut(self, number, *, off):
        """Cut a namespace off, or connect it again."""
        ip("link", "set", f"{self.bridge}v{number}", "down" if off else "up")

    def close(self):
        for name in self.spaces:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def network():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = None
    try:
        made = Network()
        made.space()
    except subprocess.CalledProcessError as error:
        if made:
            made.close()
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode()[:200]}")
    yield made
    made.close()


@pytest.fixture
def secure(network, tmp_path):
    """A cluster on the bridge, with a role for workers that may change no table."""
    if (programs := find_postgres()) is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres(programs, network.address, tls=True) as cluster:
        cluster.sql("CREATE ROLE worker LOGIN PASSWORD 'a test''s password'")
        cluster.sql("CREATE ROLE other LOGIN PASSWORD 'another'")
        cluster.sql("CREATE DATABASE fleet")
        Database.upgrade(cluster.admin("fleet"), role="worker").close()
        for role, password in (("worker", "a test's password"), ("other", "another")):
            path = tmp_path / f"{role}.pgpass"
            path.write_text(f"{cluster.host}:{cluster.port}:*:{role}:{password}\n")
            path.chmod(0o600)
        yield cluster


def verified(cluster, role="worker", **more):
    return cluster.url("fleet", role, sslmode="verify-full", sslrootcert=str(cluster.authority), **more)


def test_only_who_is_let_in_gets_in_and_only_by_tls(secure, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "worker.pgpass"))
    for weak in ("", "disable", "require", "verify-ca"):
        with pytest.raises(SettingsError, match="verify-full"):
            Database.open(secure.url("fleet", "worker", **({"sslmode": weak} if weak else {})))
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
        psycopg.connect(secure.url("fleet", "worker", sslmode="disable"), connect_timeout=5)
    with pytest.raises(StorageError, match="certificate verify failed"):  # another authority
        Database.open(secure.url("fleet", "worker", sslmode="verify-full", sslrootcert="system"))
    database = Database.open(verified(secure))
    with database.read() as connection:
        used = connection.exec_driver_sql("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()").scalar()
    assert used == "TLSv1.3"
    for forbidden in ("CREATE TABLE x (y integer)", "ALTER TABLE ledger ADD COLUMN x integer", "DROP TABLE ledger",
                      "TRUNCATE ledger"):  # fmt: skip
        with pytest.raises(StorageError), database.write() as connection:
            connection.exec_driver_sql(forbidden)
    database.close()
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "other.pgpass"))
    with pytest.raises(StorageError, match=r"permission denied for database"):
        Database.open(verified(secure, "other"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_that_is_cut_off_stops_and_comes_back(secure, network, make_host, tmp_path, script, monkeypatch):
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "worker.pgpass"))
    prefixes = [["ip", "netns", "exec", network.spaces[0]], network.space(), network.space()]
    more = {"PGPASSFILE": str(tmp_path / "worker.pgpass"), "PLAYED_TAKES_S": "0.3"}
    hosts = [make_host(f"host-{number}", url=verified(secure), prefix=prefix, **more)
             for number, prefix in enumerate(prefixes)]  # fmt: skip
    workspaces = tmp_path / "workspaces"
    ids = [one for host in hosts for one in host.begin(6, script, workspaces)]
    for host in hosts:
        host.start()
    first, cut = hosts[0], hosts[1]
    until(lambda: "step" in cut.said(), what="it works")
    network.cut(1, off=True)
    until(lambda: not first.hosts()["host-1"].alive, timeout_s=4 * LEASE_S, what="others noticed")
    log = cut.home.folder / "state" / "log" / "luminaguard.jsonl"
    until(lambda: '"lease.lost"' in log.read_text(), timeout_s=LEASE_S, what="it noticed itself")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(event["event"] == "lease.lost" and "not confirmed" in event["why"] for event in events)
    said = cut.said().count("step")
    time.sleep(LEASE_S)
    assert cut.said().count("step") == said  # cut off, it saves nothing
    network.cut(1, off=False)
    see_through(first, ids, timeout_s=120)
    for folder in workspaces.iterdir():
        assert {path.name: path.read_text() for path in folder.iterdir()} == EXPECTED
    with first.runtime() as runtime:
        entries = list(runtime.ledger.entries())
        runtime.ledger.verify()
    claims = Counter(json.loads(entry.body)["request"] for entry in entries if entry.kind == "request.claimed")
    assert max(claims.values()) == 1 and len(claims) == 2 * len(ids)
