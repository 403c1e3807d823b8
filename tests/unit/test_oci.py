"""Container images: flattened as the specification says, and refused where they lie, lead outside or are too much."""

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.errors import ImageBuildFailed
from luminaguard.images.imported import RUNTIME, finish
from luminaguard.images.oci import Limits, read_image
from luminaguard.images.rootfs import FILES, SKELETON, Node

LIMITS = Limits()


def entry(name, data=b"", *, kind=tarfile.REGTYPE, mode=0o644, link="", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def folder(name, mode=0o755):
    return entry(name, kind=tarfile.DIRTYPE, mode=mode)


def link(name, target):
    return entry(name, kind=tarfile.SYMTYPE, link=target)


def layer(*entries) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layout(path, *layers, pack=gzip.compress, config=None, change=lambda name, data: data):
    """An OCI layout of these layers; ``change`` may spoil what is written."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data, name):
        (blobs / sha(data)[7:]).write_bytes(change(name, data))
        return {"mediaType": "application/x", "digest": sha(data), "size": len(data)}

    rootfs = {"type": "layers", "diff_ids": [sha(data) for data in layers]}
    described = {"os": "linux", "architecture": "amd64", "rootfs": rootfs, **(config or {})}
    manifest = {"schemaVersion": 2, "config": put(json.dumps(described).encode(), "config"),
                "layers": [put(pack(data), "layer") for data in layers]}  # fmt: skip
    index = {"schemaVersion": 2, "manifests": [put(json.dumps(manifest).encode(), "manifest")]}
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def read(path, limits=LIMITS):
    spool = io.BytesIO()
    image = read_image(path, spool, lambda _: None, limits)
    found = {}
    for name, node in image.tree.items():
        stretch = node.stretch
        found[name] = (
            node.target if node.kind == "link"
            else spool.getvalue()[stretch.start : stretch.start + stretch.size] if stretch else None
        )  # fmt: skip
    return image, found


LOWER = (folder("etc"), entry("etc/a", b"1"), entry("etc/b", b"2", mode=0o6755), folder("d"), entry("d/x", b"x"),
         link("bin", "usr/bin"), folder("usr"), folder("usr/bin"))  # fmt: skip


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bytes])
def test_layers_are_flattened_as_the_specification_says(tmp_path, pack):
    upper = layer(
        entry("etc/.wh.a"), entry("etc/c", b"3"), entry("d/.wh..wh..opq"), entry("d/y", b"y"),
        entry("bin/tool", b"t", mode=0o755), entry("usr/bin/other", kind=tarfile.LNKTYPE, link="bin/tool"),
    )  # fmt: skip
    image, found = read(layout(tmp_path / "l", layer(*LOWER), upper, pack=pack))
    assert found == {
        "etc": None, "etc/b": b"2", "etc/c": b"3", "d": None, "d/y": b"y", "bin": "usr/bin", "usr": None,
        "usr/bin": None, "usr/bin/tool": b"t", "usr/bin/other": b"t",
    }  # fmt: skip
    assert image.tree["etc/b"].mode == 0o755  # no set-id bit
    assert len(image.layers) == 2


def test_a_whiteout_hides_what_lower_layers_have_and_not_its_own(tmp_path):
    upper = layer(
        folder("d"), entry("d/new", b"n"), entry("d/.wh..wh..opq"), entry("etc/a", b"own"), entry("etc/.wh.a")
    )
    _, found = read(layout(tmp_path / "l", layer(*LOWER), upper))
    assert (found["d/new"], found["etc/a"], "d/x" in found) == (b"n", b"own", False)


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path):
    _, found = read(
        layout(tmp_path / "l", layer(*LOWER), layer(entry("d", b"f"), folder("etc/a"), entry("etc/a/z", b"z")))
    )
    assert (found["d"], found["etc/a/z"]) == (b"f", b"z")
    assert "d/x" not in found


def test_links_are_followed_inside_only(tmp_path):
    entries = (folder("a"), link("a/out", "/../../../etc"), link("up", "../.."), folder("etc"))
    _, found = read(layout(tmp_path / "l", layer(*entries), layer(entry("a/out/passwd", b"p"), entry("up/x", b"x"))))
    assert (found["etc/passwd"], found["x"]) == (b"p", b"x")


@pytest.mark.parametrize(
    "entries",
    [
        (entry("../x", b"x"),), (entry("a/../../x", b"x"),), (entry("f", b"x"), entry("f/g", b"y")),
        (entry("h", kind=tarfile.LNKTYPE, link="missing"),),
        (entry("h", kind=tarfile.LNKTYPE, link="../../etc/passwd"),),
        (folder("d"), entry("h", kind=tarfile.LNKTYPE, link="d")),
        (link("l", "l"), entry("l/x", b"x")), (entry("n\nm", b""),), (entry("a/" * 200 + "x", b""),),
        (entry(".wh.."),), (entry(".wh."),), (link("l", ""),), (entry("x" * 300),), (entry("é" * 200),),
        (entry(".wh.d/x"),), (link("l", "\udcff"),),
        (entry("s", kind=tarfile.GNUTYPE_SPARSE),),
    ],
)  # fmt: skip
def test_what_leads_outside_or_nowhere_is_refused(tmp_path, entries):
    with pytest.raises(ImageBuildFailed, match="container image cannot be used"):
        read(layout(tmp_path / "l", layer(*entries)))


def test_devices_and_pipes_are_left_out(tmp_path):
    nodes = (
        entry("dev0", kind=tarfile.CHRTYPE),
        entry("dev1", kind=tarfile.BLKTYPE),
        entry("p", kind=tarfile.FIFOTYPE),
    )
    _, found = read(layout(tmp_path / "l", layer(*nodes, entry("f", b"1"))))
    assert found == {"f": b"1"}


def test_holes_are_refused_however_they_are_told(tmp_path):
    info, _ = entry("s", b"x" * 512)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s",
                        "GNU.sparse.realsize": str(1 << 40)}  # fmt: skip
    with pytest.raises(ImageBuildFailed):
        read(layout(tmp_path / "l", layer((info, b"1\n0\n512\n".ljust(512, b"\0")))))


def raw(name, *, kind=tarfile.REGTYPE, size=0, data=b"") -> bytes:
    """A header as no library would write it, and what follows."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "data",
    [
        raw("x", kind=tarfile.GNUTYPE_SPARSE, size=512),
        raw("x", kind=tarfile.XGLTYPE, size=5000, data=b"20 comment=xxxxxxxx\n" * 250),
        raw("x", kind=tarfile.XHDTYPE, size=1 << 20),
        raw("x", kind=tarfile.XHDTYPE, size=20, data=b"1" * 20),  # tarfile takes the square of it
        raw("x", kind=tarfile.XHDTYPE, size=1300, data=b"13 a=bcdefgh\n" * 100),
        raw("x", kind=tarfile.XHDTYPE, size=30, data=b"30 GNU.sparse.realsize=123456\n"),
        raw(".", size=1 << 70), raw(".wh.a", size=1 << 40), raw("d", kind=tarfile.DIRTYPE, size=1 << 70),
        raw("a") + b"\xff" * 512 + raw("b"),
    ],
)  # fmt: skip
def test_headers_that_would_keep_the_reader_busy_are_refused(tmp_path, data):
    start = time.process_time()
    with pytest.raises(ImageBuildFailed):
        read(layout(tmp_path / "l", data + bytes(1024)))
    assert time.process_time() - start < 60


def test_an_ordinary_extended_header_is_read(tmp_path):
    long, comment = "d/" * 60 + "ü" * 60, tarfile.TarInfo("x")
    comment.type, comment.size = tarfile.XGLTYPE, 18
    git = comment.tobuf() + b"18 comment=abcdef\n".ljust(512, b"\0")
    _, found = read(layout(tmp_path / "l", git + layer(entry(long, b"1"))))
    assert found[long] == b"1"


def test_folders_on_the_way_count_and_so_do_all_names(tmp_path):
    deep = [entry(f"{i}/" + "a/" * 100 + "x") for i in range(200)]
    with pytest.raises(ImageBuildFailed, match="folders on the way"):
        read(layout(tmp_path / "l", layer(*deep)), Limits(entries=5000))


@pytest.mark.parametrize("environment", [["A=x\0y"], ["A=\ud800"], ["A=" + "\U0001f600" * 16_000]])
def test_an_environment_that_no_command_could_have_is_refused(tmp_path, environment):
    with pytest.raises(ImageBuildFailed, match="environment"):
        read(layout(tmp_path / "l", layer(entry("f")), config={"config": {"Env": environment}}))


def test_a_pipe_in_place_of_an_archive_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageBuildFailed):
        read(tmp_path / "pipe")


def test_a_full_disk_is_no_fault_of_the_image(tmp_path):
    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as error:
        read_image(layout(tmp_path / "l", layer(entry("f", b"1"))), Full(), lambda _: None)
    assert error.value.errno == errno.ENOSPC


def test_a_layer_that_docker_wrote_before_is_a_link(tmp_path):
    data = layer(entry("f", b"1"))
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [sha(data)] * 2}}).encode()
    saved = [{"Config": f"{sha(config)[7:]}.json", "Layers": ["a/layer.tar", "b/layer.tar"]}]
    with tarfile.open(tmp_path / "docker.tar", "w") as tar:
        for name, content in ((saved[0]["Config"], config), ("a/layer.tar", data),
                              ("manifest.json", json.dumps(saved).encode())):  # fmt: skip
            tar.addfile(entry(name, content)[0], io.BytesIO(content))
        tar.addfile(link("b/layer.tar", "../a/layer.tar")[0])
    assert read(tmp_path / "docker.tar")[1] == {"f": b"1"}


def test_all_names_of_a_file_count(tmp_path):
    names = [entry(f"n{i}", kind=tarfile.LNKTYPE, link="f") for i in range(20)]
    with pytest.raises(ImageBuildFailed, match="all of their names"):
        read(layout(tmp_path / "l", layer(entry("f", bytes(1 << 20)), *names)), Limits(unpacked=8 << 20))


def test_hiding_the_same_again_and_again_takes_no_time(tmp_path):
    """As one layer could, with many files of its own: each of them would be looked at each time."""
    many = [entry(f"d/{i}") for i in range(15_000)]
    hide = [entry("d/.wh..wh..opq"), entry(".wh.d")] * 7_500
    start = time.process_time()
    _, found = read(layout(tmp_path / "l", layer(*many, *hide)))
    assert len(found) == 15_001
    assert time.process_time() - start < 60


def test_links_that_lead_on_and_on_are_refused(tmp_path):
    link_to_link = [link(f"l{i}", "./" * 500 + f"l{i + 1}") for i in range(30)]
    with pytest.raises(ImageBuildFailed, match="too long"):
        read(layout(tmp_path / "l", layer(*link_to_link, folder("l30"), entry("l0/x"))))


def test_a_pipe_in_a_layout_is_not_waited_for(tmp_path):
    path = layout(tmp_path / "l", layer(entry("f", b"1")))
    (path / "index.json").unlink()
    os.mkfifo(path / "index.json")
    with pytest.raises(ImageBuildFailed):
        read(path)


@pytest.mark.parametrize("spoiled", ["config", "manifest", "layer"])
def test_a_digest_that_is_wrong_is_refused(tmp_path, spoiled):
    def change(name, data):
        return data if name != spoiled else data[:-1] + bytes([data[-1] ^ 1])

    with pytest.raises(ImageBuildFailed):
        read(layout(tmp_path / "l", layer(entry("f", b"1")), change=change))


def test_a_layer_that_unpacks_to_something_else_is_refused(tmp_path):
    other = {"rootfs": {"type": "layers", "diff_ids": [sha(b"else")]}}
    with pytest.raises(ImageBuildFailed, match="other contents"):
        read(layout(tmp_path / "l", layer(entry("f", b"1")), config=other))


@pytest.mark.parametrize(
    ("limits", "data"),
    [(Limits(unpacked=1 << 20), bytes(8 << 20)), (Limits(stored=1000), os.urandom(9000)), (Limits(entries=3), b"")],
)
def test_too_much_is_refused(tmp_path, limits, data):
    entries = [entry(f"f{i}", data) for i in range(5)]
    with pytest.raises(ImageBuildFailed):
        read(layout(tmp_path / "l", layer(*entries)), limits)


def test_a_header_that_would_fill_memory_is_refused(tmp_path):
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    data = huge.tobuf() + bytes(1 << 20)
    with pytest.raises(ImageBuildFailed, match="header"):
        read(layout(tmp_path / "l", data))


def test_a_layout_in_a_tar_and_what_docker_saves(tmp_path):
    data = layer(entry("f", b"1"))
    made = layout(tmp_path / "l", data)
    with tarfile.open(tmp_path / "oci.tar", "w") as tar:
        tar.add(made, ".")
    assert read(tmp_path / "oci.tar")[1] == {"f": b"1"}
    environment = {"Env": ["PATH=/opt/bin", "HOME=/x", "A=b=c"]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "config": environment,
                         "rootfs": {"diff_ids": [sha(data)]}}).encode()  # fmt: skip
    saved = [{"Config": f"{sha(config)[7:]}.json", "RepoTags": ["x:1"], "Layers": ["abc/layer.tar"]}]
    with tarfile.open(tmp_path / "docker.tar", "w") as tar:
        for name, content in ((saved[0]["Config"], config), ("abc/layer.tar", data),
                              ("manifest.json", json.dumps(saved).encode())):  # fmt: skip
            tar.addfile(entry(name, content)[0], io.BytesIO(content))
    image, found = read(tmp_path / "docker.tar")
    assert (image.digest, found) == (sha(config), {"f": b"1"})
    assert image.environment == {"PATH": "/opt/bin", "A": "b=c"}


@pytest.mark.parametrize("what", ["empty", "file", "missing", "other processor", "link"])
def test_what_is_no_image_is_refused(tmp_path, what):
    path = tmp_path / "i"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"no tar" * 500)
    elif what == "other processor":
        layout(path, layer(entry("f", b"1")), config={"architecture": "arm64"})
    elif what == "link":  # a blob that is a link to a file of the host
        layout(path, layer(entry("f", b"1")))
        for blob in (path / "blobs" / "sha256").iterdir():
            blob.rename(tmp_path / blob.name)
            blob.symlink_to(tmp_path / blob.name)
    with pytest.raises(ImageBuildFailed):
        read(path)


NAMES = st.sampled_from(["a", "b", "a/b", "a/b/c", "b/c", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", "b/.wh..wh..opq"])
ENTRIES = st.one_of(
    st.builds(entry, NAMES, st.binary(max_size=3)), st.builds(folder, NAMES),
    st.builds(link, NAMES, st.sampled_from(["a", "/b", "..", "b/c", "/", "../../a"])),
    st.builds(lambda name, to: entry(name, kind=tarfile.LNKTYPE, link=to), NAMES, NAMES),
)  # fmt: skip


@given(st.lists(st.lists(ENTRIES, max_size=6), min_size=1, max_size=3))
def test_any_layers_make_a_whole_tree_or_a_refusal(tmp_path_factory, layers):
    path = layout(tmp_path_factory.mktemp("any") / "l", *(layer(*entries) for entries in layers))
    try:
        image, _ = read(path)
    except ImageBuildFailed:
        return
    for name in image.tree:
        parent = name.rpartition("/")[0]
        assert not parent or image.tree[parent].kind == "dir", name
        assert not name.rpartition("/")[2].startswith(".wh.")


def test_a_container_becomes_the_root_of_a_machine():
    tree = {name: Node("dir", 0o755) for name in ("etc", "usr", "usr/lib", "var", "opt", "tmp", "root", "root/.ssh")}
    tree |= {name: Node("file", 0o644, b"theirs") for name in (
        "etc/passwd", "etc/shadow", "etc/ld.so.preload", "etc/machine-id", "etc/ssh/ssh_host_rsa_key", "opt/app",
        "etc/ld.so.cache", "tmp/left", "run/x", "etc/passwd/x", "etc/shadow/x", "etc/machine-id/x",
        "root/.ssh/id", f"{RUNTIME}/usr/bin/python3", "dev/null")}  # fmt: skip
    libraries = "usr/lib/x86_64-linux-gnu"
    packages = {"usr/bin/python3": Node("link", 0o777, target="python3.9"),
                "usr/bin/python3.9": Node("file", 0o755, b"p"),
                "usr/lib/python3.9/os.py": Node("file", 0o644, b"o"),
                f"{libraries}/ld-linux-x86-64.so.2": Node("file", 0o755, b"l")}  # fmt: skip
    root = finish(tree, packages)
    assert root["opt/app"].data == root["etc/ld.so.cache"].data == b"theirs"
    assert root["etc/passwd"].data == FILES["etc/passwd"].encode()
    assert root["etc/machine-id"].kind == "link"
    assert set(SKELETON) - {"usr/sbin"} <= set(root)
    for gone in (
        "etc/shadow",
        "etc/ld.so.preload",
        "etc/ssh/ssh_host_rsa_key",
        "tmp/left",
        "run/x",
        "root/.ssh/id",
        "dev/null",
    ):
        assert gone not in root
    assert root[f"{RUNTIME}/usr/bin/python3"].target == "python3.9"
    assert root[f"{RUNTIME}/{libraries}/ld-linux-x86-64.so.2"].data == b"l"
    with pytest.raises(ImageBuildFailed, match="/etc"):
        finish(tree | {"etc": Node("link", 0o777, target="/opt")}, packages)
