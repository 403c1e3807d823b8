"""Layers with servers: what package managers wrote is not believed, and what lies on disk is what was built."""

import json
import os
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from luminaguard.errors import ImageBuildFailed, ImageMissing, ImageTampered, PackageUnavailable
from luminaguard.images import elf
from luminaguard.images.audit import audit_layer
from luminaguard.images.build import part_of, squash
from luminaguard.images.layers import build, npm, programs, pypi
from luminaguard.images.layers.folder import read_folder
from luminaguard.images.layers.programs import run
from luminaguard.images.layers.store import DISK, LOCK, PARTS, SBOM, LayerManifest, LayerStore
from luminaguard.images.rootfs import Node, add_parents, compile_sources
from luminaguard.runtime import Runtime
from luminaguard.runtime.mcp import McpServers
from luminaguard.settings import Folders, load_settings


class _Image:
    class manifest:  # noqa: N801  # as an image has it
        container, distribution = "", "debian-12"


def kept(folder: Path, tree) -> LayerStore:
    """A store with one layer of this tree."""
    add_parents(tree)
    work = folder / "work"
    work.mkdir(parents=True)
    squash(tree, work / DISK)
    (work / LOCK).write_text("{}")
    (work / SBOM).write_text("{}")
    manifest = LayerManifest("npm", "@a/b", "1.0.0", ("b",), "debian-12", 1, {name: part_of(work / name)
                                                                              for name in PARTS})  # fmt: skip
    (work / "manifest.json").write_text(manifest.dumps())
    work.rename(folder / manifest.digest)
    return LayerStore(folder)


@pytest.fixture
def store(tmp_path):
    return kept(tmp_path / "layers", {"usr/bin/b": Node("file", 0o755, b"#!/bin/sh\n")})


def only(store):
    return next(store.folder.iterdir())


def test_a_layer_is_what_was_built(store):
    layer = store.load(only(store).name)
    assert layer.name == "npm:@a/b@1.0.0" and layer.read(LOCK) == b"{}"
    fd = layer.open_on(_Image)
    assert os.pread(fd, 4, 0) == b"hsqs"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


@pytest.mark.parametrize("part", [DISK, LOCK, SBOM])
def test_a_part_that_was_changed_is_not_used(store, part):
    path = only(store) / part
    path.write_bytes(path.read_bytes() + b"x")
    layer = store.load(path.parent.name)
    with pytest.raises(ImageTampered) as caught:
        layer.open_on(_Image) if part == DISK else layer.read(part)
    assert "add its server again" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(store, text):
    (only(store) / "manifest.json").write_text(text)
    with pytest.raises(ImageTampered):
        store.load(only(store).name)


def test_a_manifest_of_another_layer_is_refused(store):
    path = only(store) / "manifest.json"
    path.write_text(path.read_text().replace("1.0.0", "1.0.1"))
    with pytest.raises(ImageTampered):
        store.load(only(store).name)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_what_others_can_write_to_is_not_used(store, mode):
    only(store).chmod(mode)
    with pytest.raises(ImageTampered):
        store.load(only(store).name)


@pytest.mark.parametrize("name", ["", "x", "../x", "0" * 64])
def test_what_there_is_none_of(store, name):
    with pytest.raises(ImageMissing):
        store.load(name)


@pytest.mark.parametrize(("container", "distribution"), [("sha256:1", "debian-12"), ("", "debian-13")])
def test_a_layer_lies_on_the_image_that_it_was_built_for(store, container, distribution):
    image = type("Image", (), {"manifest": type("M", (), {"container": container, "distribution": distribution})})
    with pytest.raises(ImageMissing):
        store.load(only(store).name).open_on(image)


# -- what a package has -------------------------------------------------------------------------------------------


def test_a_folder_is_read_with_modes_of_our_own(tmp_path):
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a" / "run").write_text("x")
    (tmp_path / "a" / "run").chmod(0o6755)
    (tmp_path / "data").write_text("y")
    (tmp_path / "data").chmod(0o666)
    (tmp_path / "link").symlink_to("a/run")
    (tmp_path / "left").write_text("z")
    tree = read_folder(tmp_path, "usr/x", drop=lambda path: path == "left")
    assert {path: (node.kind, node.mode, node.target) for path, node in tree.items()} == {
        "usr/x/a": ("dir", 0o755, ""), "usr/x/a/run": ("file", 0o755, ""), "usr/x/data": ("file", 0o644, ""),
        "usr/x/link": ("link", 0o777, "a/run"),
    }  # fmt: skip


@pytest.mark.parametrize("make", [
    lambda f: os.mkfifo(f / "x"), lambda f: (f / "x").symlink_to("/etc/passwd"), lambda f: (f / "x").symlink_to("../y"),
    lambda f: (f / "a\nb").write_text(""), lambda f: os.mkdir(os.fsencode(f) + b"/\xff"),
    lambda f: (f / "\N{RIGHT-TO-LEFT OVERRIDE}x").write_text(""),
])  # fmt: skip
def test_a_folder_with_what_no_layer_may_have_is_refused(tmp_path, make):
    make(tmp_path)
    with pytest.raises(ImageBuildFailed):
        read_folder(tmp_path, "usr/x")


@pytest.mark.parametrize("package", [
    "", "-g", "--registry=http://evil", "../x", "file:x", "git+https://x/y", "https://x/y.tgz", "a b", "@a", "@a/",
    "a@", "a@file:../x", "a@npm:b", "a@https://x", "A", "a\n", "a@1 --x", "user/repo", "@a/b/c", ".hidden",
])  # fmt: skip
def test_what_is_no_package_of_npm_is_not_even_asked_for(tmp_path, monkeypatch, package):
    monkeypatch.setattr(npm, "run", lambda *_, **__: pytest.fail("it was run"))
    for packages in ((package, ()), ("good", (package,))):
        with pytest.raises(PackageUnavailable):
            npm.resolve(*packages, tmp_path)


@pytest.mark.parametrize("package", [
    "", "-r x", "--index-url=http://evil", "./x", "a @ https://x/y.whl", "git+https://x/y", "a[b", "a\n-r x", "a;x",
    "a==1 --hash=x", "-e .", "a==1\n", "a/b", "a==1;python_version<'4'",
])  # fmt: skip
def test_what_is_no_package_of_pypi_is_not_even_asked_for(tmp_path, monkeypatch, package):
    monkeypatch.setattr(pypi, "run", lambda *_, **__: pytest.fail("it was run"))
    for packages in ((package, ()), ("good", (package,))):
        with pytest.raises(PackageUnavailable):
            pypi.resolve(*packages, "3.11", tmp_path)


def test_a_package_without_a_hash_is_refused(tmp_path, monkeypatch):
    def played(_command, folder, **_):
        packages = {"": {}, "node_modules/a": {"version": "1.0.0", "resolved": "git+ssh://git@x/y#z"}}
        (folder / "package-lock.json").write_text(json.dumps({"name": "tmp", "packages": packages}))
        return ""

    monkeypatch.setattr(npm, "run", played)
    with pytest.raises(PackageUnavailable, match="no hash"):
        npm.resolve("a", (), tmp_path)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"packages": 1}', "[" * 50_000, '{"lockfileVersion": 1}'])
def test_a_lock_that_is_none_is_refused_in_words(tmp_path, monkeypatch, text):
    def played(_command, folder, **_):
        if text is not None:
            (folder / "package-lock.json").write_text(text)
        return ""

    monkeypatch.setattr(npm, "run", played)
    with pytest.raises(PackageUnavailable, match="no lock"):
        npm.resolve("a", (), tmp_path)


def installed(monkeypatch, work, files, package="@a/b"):
    """What comes of an npm package with these files."""

    def played(*_, **__):
        for path, text in files.items():
            target = work / "node_modules" / package / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return ""

    monkeypatch.setattr(npm, "run", played)
    lock = {"manifest": {}, "lock": {"packages": {"": {}, f"node_modules/{package}": {
        "version": "1.0.0", "integrity": "sha512-" + "A" * 86 + "=="}}}}  # fmt: skip
    return npm.install(f"{package}@1.0.0", lock, work)


def test_programs_of_npm_are_links_to_files_of_their_package(tmp_path, monkeypatch):
    about = {"version": "1.0.0", "bin": {"b": "dist/i.js", "up": "../../x", "a/b": "dist/i.js", "-x": "dist/i.js",
                                         "gone": "dist/none.js"}}  # fmt: skip
    version, tree, programs, components = installed(
        monkeypatch, tmp_path, {"package.json": json.dumps(about), "dist/i.js": "x", "dist/i.js.map": "y"}
    )
    place = "usr/lib/luminaguard-servers/node_modules/@a/b"
    assert (version, programs) == ("1.0.0", {"b": f"{place}/dist/i.js"})
    assert tree["usr/bin/b"] == Node("link", 0o777, target=f"/{place}/dist/i.js")
    assert tree[f"{place}/dist/i.js"].mode == 0o755 and f"{place}/dist/i.js.map" not in tree
    (component,) = components
    assert (component.purl, component.hashes) == ("pkg:npm/%40a/b@1.0.0", (("SHA-512", "00" * 64),))


@pytest.mark.parametrize("bins", [None, {}, {"b": "none.js"}, {"b": "/etc/passwd"}])
def test_a_package_without_a_program_is_refused(tmp_path, monkeypatch, bins):
    with pytest.raises(ImageBuildFailed):
        installed(monkeypatch, tmp_path, {"package.json": json.dumps({"version": "1.0.0", "bin": bins})})


@pytest.mark.parametrize("about", [
    b"", b"\xff", b"[" * 50_000, b"[]", b"{}", b'{"version": 1}', b'{"version": "1", "bin": []}',
    b'{"version": "1", "bin": 4}', b'{"version": "1", "bin": {"b": "dist"}}',
])  # fmt: skip
def test_an_odd_manifest_is_refused_in_words(about):
    place = "usr/lib/luminaguard-servers/node_modules/a"
    tree = {f"{place}/package.json": Node("file", 0o644, about), f"{place}/dist": Node("dir", 0o755)}
    with pytest.raises(ImageBuildFailed):
        npm._programs(npm._about(tree, "a"), "a", tree)


@pytest.mark.parametrize(("line", "found"), [
    ("good = a.b:main", {"good": ("a.b", "main")}), ("good = a:b.c [extra]", {"good": ("a", "b.c")}),
    ("bad = a.b:main(); import os", {}), ("bad = os", {}), ("../bad = a:b", {}), ("-bad = a:b", {}),
    ("bad = a:b\\nimport", {}),
])  # fmt: skip
def test_programs_of_pypi_are_names_and_nothing_else(line, found):
    path = "usr/lib/luminaguard-servers/python/My_Server-1.0.dist-info/entry_points.txt"
    tree = {path: Node("file", 0o644, f"[console_scripts]\n{line}\n[gui_scripts]\nx = y:z\n".encode())}
    assert pypi._entries("my.server", "1.0", tree) == found
    assert pypi._entries("my.server", "1.1", tree) == pypi._entries("other", "1.0", tree) == {}


@pytest.mark.parametrize("text", [b"[", b"\xff", b"[console_scripts]\nx = a:b\nx = a:c\n"])
def test_programs_that_cannot_be_read_are_refused(text):
    path = "usr/lib/luminaguard-servers/python/a-1.0.dist-info/entry_points.txt"
    with pytest.raises(ImageBuildFailed):
        pypi._entries("a", "1.0", {path: Node("file", 0o644, text)})


# -- on an image --------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    tree = {"usr/bin/sh": Node("file", 0o755, b"x"), "usr/lib/x86_64-linux-gnu/libc.so.6": Node("file", 0o755, b"x")}
    add_parents(tree)
    squash(tree, folder / "root.squashfs")
    return type("Image", (), {"folder": folder})


def test_a_layer_cannot_have_a_program_of_the_image(image):
    with pytest.raises(ImageBuildFailed, match="has a program 'sh' already"):
        build._refuse_what_is_there({"usr/bin/sh": Node("file", 0o755)}, {"sh": "usr/bin/sh"}, image)


@pytest.mark.parametrize("size", [20, 64, 100, 200])
def test_a_file_that_only_begins_like_a_program_is_no_fault(image, size):
    data = (elf.MAGIC.ljust(18, b"\0") + elf.X86_64).ljust(size, b"\x01")
    build._refuse_what_is_there({"usr/x": Node("file", 0o644, data)}, {}, image)


@pytest.mark.parametrize("source", [b"-" * 100_000, b"f" + b"()" * 50_000, b"a" + b".a" * 50_000, b"\0", b"def"])
def test_a_source_that_cannot_be_compiled_is_left_as_it_is(source):
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tree = {"usr/x/good.py": Node("file", 0o644, b"x = 1\n"), "usr/x/bad.py": Node("file", 0o644, source)}
    compile_sources(tree, "usr/x/", python)
    assert [path for path in tree if path.endswith(".pyc")] == [
        f"usr/x/__pycache__/good.{sys.implementation.cache_tag}.pyc"
    ]


def test_a_package_from_elsewhere_than_a_registry_is_refused(tmp_path, monkeypatch):
    def played(_command, folder, **_):
        one = {"version": "1.0.0", "resolved": "https://evil.example/a.tgz", "integrity": "sha512-x"}
        (folder / "package-lock.json").write_text(json.dumps({"packages": {"": {}, "node_modules/a": one}}))
        return ""

    monkeypatch.setattr(npm, "run", played)
    with pytest.raises(PackageUnavailable, match="from elsewhere"):
        npm.resolve("a", (), tmp_path)


def test_a_package_manager_asks_registries_only_and_ends_with_all_that_it_started(tmp_path, monkeypatch):
    told = run(("env",), tmp_path, missing="")
    assert "npm_config_git=/bin/false" in told and "npm_config_allow_remote=none" in told
    monkeypatch.setattr(programs, "FETCH_S", 0.3)
    began = time.monotonic()
    with pytest.raises(PackageUnavailable, match="did not end"):
        run(("sh", "-c", "sleep 60 & echo $! > child; wait"), tmp_path, missing="")
    assert time.monotonic() - began < 10
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "cmdline"
    assert not child.exists() or not child.read_bytes()  # killed, and perhaps not reaped yet


def test_what_the_image_has_is_left_out(image):
    tree = {"usr/lib/x86_64-linux-gnu/libc.so.6": Node("file", 0o755, b"other"), "usr/bin/b": Node("file", 0o755)}
    build._refuse_what_is_there(tree, {"b": "usr/bin/b"}, image)
    assert list(tree) == ["usr/bin/b"]


def test_a_library_that_is_missing_is_told_of(image, monkeypatch):
    node = Node("file", 0o755, elf.MAGIC.ljust(18, b"\0") + elf.X86_64)
    monkeypatch.setattr(elf, "needed", lambda _: ["libc.so.6", "libown.so.1", "libgone.so.1"])
    tree = {"usr/bin/b": node, "usr/lib/luminaguard-servers/python/b.libs/libown.so.1": Node("file", 0o644)}
    with pytest.raises(ImageBuildFailed, match="libgone"):
        build._refuse_what_is_there(tree, {}, image)


@pytest.mark.parametrize(("path", "node", "name"), [
    ("usr/bin/x", Node("file", 0o4755), "set-id"), ("usr/x", Node("file", 0o666), "writable-by-all"),
    ("etc/x", Node("file", 0o644), "place"), ("usr/bin/gcc", Node("file", 0o755), "programs"),
])  # fmt: skip
def test_a_disk_that_is_no_layer_is_found_out(tmp_path, path, node, name):
    tree = {path: node, "usr/bin/node": Node("file", 0o755)}
    add_parents(tree)
    squash(tree, tmp_path / "disk")
    checks = audit_layer(tmp_path / "disk", tmp_path)
    assert [check.name for check in checks if check.verdict == "fail"] == [name]
    shutil.rmtree(tmp_path, ignore_errors=True)


# -- what a server of a layer has ---------------------------------------------------------------------------------


def test_tools_of_a_layer_that_was_used_are_known_without_starting_it(tmp_path):
    folders = Folders(*(tmp_path / name for name in ("config", "state", "cache", "run"))).ensure()
    tool = {"name": "b", "description": "Does.", "inputSchema": {"type": "object"}}

    def told(layer, work):
        (folders.config / "luminaguard.toml").write_text(f'[mcp_servers.s]\ncommand = ["b"]\nlayer = "{layer}"\n')
        with closing(Runtime(load_settings(folders), folders)) as runtime:
            return work(McpServers(runtime))

    assert told("a" * 64, lambda servers: servers.cached("s")) is None
    told("a" * 64, lambda servers: servers.check("s", {"b": tool}))
    assert told("a" * 64, lambda servers: servers.cached("s")) == {"b": tool}
    for layer in ("", "c" * 64):  # another one may say something else
        assert told(layer, lambda servers: servers.cached("s")) is None
    assert told("c" * 64, lambda servers: servers.check("s", {"b": tool | {"title": "B"}})).quarantined == ("b",)
    assert told("c" * 64, lambda servers: servers.cached("s")) is None
    told("c" * 64, lambda servers: servers.check("s", {"b": tool}))  # the same tools
    assert told("c" * 64, lambda servers: servers.cached("s")) == {"b": tool}
