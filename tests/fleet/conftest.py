"""Fixtures of fleets."""

import pytest
from fleet_hosts import SCRIPT, Host, processes_of


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.yaml"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def make_host(tmp_path):
    """Makes hosts, and ends their workers."""
    made = []

    def make(name="", **more):
        host = Host(tmp_path / f"home-{name or 'alone'}", name, keys_of=made[0] if made else None, **more)
        if not made:
            host.make_keys()
        made.append(host)
        return host

    yield make
    for host in made:
        host.end()
    left = [line for host in made for line in processes_of(host)]
    assert not left, left
