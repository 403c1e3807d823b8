"""What a command finds in the machine: the programs that the README names, Python's library, certificates."""

import json

import pytest

pytestmark = pytest.mark.vm

PROGRAMS = {
    "bash": "bash --version", "coreutils": "ls --version && sha256sum --version && env --version",
    "findutils": "find --version && xargs --version", "grep": "grep --version", "sed": "sed --version",
    "gawk": "gawk --version && awk 'BEGIN { exit 0 }'", "tar": "tar --version", "gzip": "gzip --version",
    "bzip2": "echo x | bzip2 | bunzip2", "xz": "echo x | xz | unxz", "diffutils": "diff --version && cmp --version",
    "patch": "patch --version", "file": "file /bin/bash", "jq": "echo '{}' | jq .", "git": "git --version",
    "python3": "python3 -V && python3 -m json.tool < /dev/null || true",
}  # fmt: skip
ABSENT = {"tkinter", "_tkinter", "turtle", "turtledemo", "idlelib", "lib2to3", "ensurepip", "_gdbm"}
"""Parts of Python that Debian packages apart: windows, a package manager, a database of another licence."""
ELSEWHERE = {"msvcrt", "winreg", "winsound", "_winapi", "nt", "_overlapped", "_scproxy", "_msi", "msilib",
             "_wmi", "_ios_support"}  # fmt: skip
"""Of other systems, or taken out of Python on purpose by its version."""

IMPORT_ALL = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
failed = {}
names = sorted(n for n in sys.stdlib_module_names if n not in {"antigravity", "this", "idlelib.idle"})
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)[:200]
print(json.dumps({"count": len(names), "failed": failed}))
"""

HTTPS = """
import json, ssl
context = ssl.create_default_context()
print(json.dumps(len(context.get_ca_certs())))
"""


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_that_the_readme_names_is_there(home, workspace, name):
    told = home.exec(workspace, "sh", "-ec", PROGRAMS[name])
    assert told.json["exit_code"] == 0, told.json


@pytest.mark.slow
def test_all_of_pythons_library_can_be_imported_but_what_the_readme_names(home, workspace):
    told = home.exec(workspace, "python3", "-c", IMPORT_ALL, timeout_s=170).json
    found = json.loads(told["stdout"])
    assert found["count"] > 250
    assert set(found["failed"]) - ELSEWHERE == ABSENT & set(found["failed"]), found["failed"]
    for name in ABSENT - {"_tkinter", "lib2to3", "_gdbm", "turtledemo"}:
        assert name in found["failed"], "the README says that it is missing"


def test_certificates_of_authorities_are_there(home, workspace):
    told = home.exec(workspace, "python3", "-c", HTTPS).json
    assert json.loads(told["stdout"]) > 100
