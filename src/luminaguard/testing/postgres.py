"""A real PostgreSQL for tests: a cluster of its own on a free port, which can be stopped as a crash would."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from luminaguard.storage.database import Database
from luminaguard.testing.certificates import make_certificates

__all__ = ["Postgres", "find_postgres", "running_postgres"]

_DEADLINE_S = 60


def find_postgres() -> Path | None:
    """The folder with PostgreSQL's server programs; the newest there is."""
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")  # Debian's place, which is not in PATH
    newest = max((path.parent for path in folders), key=lambda path: int(path.parent.name), default=None)
    found = shutil.which("initdb")
    return newest or (Path(found).resolve().parent if found else None)


class Postgres:
    """One cluster; made by :func:`running_postgres`.

    Attributes:
        host, port: where it listens.
        owner: the role that owns all of it.
    """

    owner = "owner"

    def __init__(self, programs: Path, folder: Path, port: int, host: str = "127.0.0.1", *, tls: bool = False) -> None:
        self._programs, self._folder = programs, folder
        self.host, self.port, self.tls = host, port, tls
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""

    @property
    def data(self) -> Path:
        """Its data directory."""
        return self._folder / "data"

    def url(self, database: str, role: str = owner, **parameters: str) -> str:
        """The URL of a database."""
        query = "&".join(f"{key}={value}" for key, value in parameters.items())
        return f"postgresql://{role}@{self.host}:{self.port}/{database}" + (f"?{query}" if query else "")

    def admin(self, database: str) -> str:
        """The URL of a database for its owner, on this machine."""
        return f"postgresql://{self.owner}@/{database}?host={self._folder}&port={self.port}"

    @property
    def authority(self) -> Path:
        """The certificate that clients check the server's with, if it speaks TLS."""
        return self._folder / "authority.pem"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                self._as_user(str(self._programs / "postgres"), "-D", str(self.data), "-p", str(self.port),
                              "-k", str(self._folder), "-c", f"listen_addresses={self.host}", *self._security()),
                stdout=log, stderr=log, cwd="/", start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            try:
                psycopg.connect(self.admin("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def _security(self) -> list[str]:
        if not self.tls:
            return []
        files = {"ssl": "on", "ssl_cert_file": self._folder / "server.pem", "ssl_key_file": self._folder / "server.key"}
        return [word for name, value in files.items() for word in ("-c", f"{name}={value}")]

    def stop(self) -> None:
        """End it at once, as a crash would: connections break, and it recovers when it is started again."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # rarely it hangs in its own handler of this signal
            self._signal(signal.SIGKILL)
            self._process.wait(_DEADLINE_S)
        self._process = None

    def freeze(self) -> None:
        """Let all its processes stand still, with their connections open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """What a statement of the owner gives."""
        with psycopg.connect(self.admin(database), autocommit=True, connect_timeout=5) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    def create(self) -> str:
        """A new database with our tables; its URL."""
        if not self._template:
            self._template = "prepared"
            self.sql(f"CREATE DATABASE {self._template}")
            Database.upgrade(self.admin(self._template)).close()
        name = f"lg_{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        self.sql(f"REVOKE CONNECT, TEMPORARY ON DATABASE {name} FROM PUBLIC")
        return self.url(name)

    @staticmethod
    def _as_user(*command: str) -> list[str]:
        """PostgreSQL refuses to run as root."""
        if os.geteuid() != 0:
            return list(command)
        uid, gid = str(user().pw_uid), str(user().pw_gid)
        return ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups", "--", *command]

    def initialise(self) -> None:
        """Make the cluster."""
        initdb = self._as_user(str(self._programs / "initdb"), "-D", str(self.data), "-U", self.owner, "-A", "trust",
                               "-E", "UTF8", "--locale=C", "--no-instructions", "-N")  # fmt: skip
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=_DEADLINE_S)
        if self.tls:
            files = make_certificates(self._folder, self.host)
            for path in files if os.geteuid() == 0 else ():
                os.chown(path, user().pw_uid, user().pw_gid)
            rules = "local all all trust\nhostssl all all all scram-sha-256\n"  # and nobody without TLS
            (self.data / "pg_hba.conf").write_text(rules)


def user() -> pwd.struct_passwd:
    """Whom the server runs as, where this is root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return pwd.getpwuid(65534)


@contextmanager
def running_postgres(programs: Path, host: str = "127.0.0.1", *, tls: bool = False) -> Iterator[Postgres]:
    """A cluster that lives as long as this context; with TLS it asks for passwords, and refuses all else."""
    folder = Path(tempfile.mkdtemp(prefix="lg-postgres-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, user().pw_uid, user().pw_gid)
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        cluster = Postgres(programs, folder, port, host, tls=tls)
        cluster.initialise()
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
