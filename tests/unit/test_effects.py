"""Changes, their digest, layers, marks and cards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.effects import Change, Changeset, DirEntry, FileEntry, LinkEntry, check_path
from luminaguard.effects.card import make_card
from luminaguard.effects.layer import Observed, changeset_from_layer
from luminaguard.effects.marks import Mark, marks_of
from luminaguard.effects.render import render
from luminaguard.effects.text import mixes_scripts, visible
from luminaguard.errors import ChangesetRefused

SHA = "a" * 64
OTHER = "b" * 64
names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda n: n not in {".", ".."} and not n.startswith(".luminaguard-")
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
entries = st.one_of(
    st.none(),
    st.builds(FileEntry, st.integers(0, 0o777), st.integers(0, 1 << 40), st.sampled_from([SHA, OTHER])),
    st.builds(DirEntry, st.integers(0, 0o777)),
    st.builds(LinkEntry, st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=20)),
)
changes = st.builds(Change, paths, entries, entries).filter(lambda c: c.before != c.after)
changesets = st.lists(changes, max_size=6, unique_by=lambda c: c.path).map(Changeset.of)


@given(changesets)
def test_a_changeset_survives_its_json(changeset):
    again = Changeset.from_json(changeset.to_json())
    assert again == changeset
    assert again.digest == changeset.digest


@given(changesets, changesets)
def test_different_changesets_have_different_digests(one, two):
    assert (one.digest == two.digest) == (one.changes == two.changes)


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a/.", "a\0b", "x" * 256, "/".join(["abc"] * 1100),
     "/".join("a" * 201),
     ".luminaguard-x/y", "\ud800"],
)  # fmt: skip
def test_paths_that_leave_or_confuse_are_refused(path):
    with pytest.raises(ChangesetRefused):
        check_path(path)


def test_names_that_are_not_utf8_are_kept():
    check_path("caf\udce9")
    change = Change("caf\udce9", None, FileEntry(0o644, 1, SHA))
    assert Changeset.from_json(Changeset.of([change]).to_json()).changes == (change,)


BASE = {
    "a": FileEntry(0o644, 3, SHA),
    "d": DirEntry(0o755),
    "d/x": FileEntry(0o644, 3, SHA),
    "d/e": DirEntry(0o755),
    "d/e/y": LinkEntry("../x"),
}


def file(path, sha=OTHER, mode=0o644, size=3):
    return Observed(path, "file", mode, size, sha256=sha)


def kinds(*layer):
    return {c.path: c.kind for c in changeset_from_layer(BASE, layer).changes}


def test_a_copied_up_file_that_is_the_same_is_no_change():
    assert kinds(file("a", SHA), Observed("d", "dir", 0o755)) == {}


def test_each_kind_of_change_is_seen():
    assert kinds(file("a")) == {"a": "modify"}
    assert kinds(file("a", SHA, 0o755)) == {"a": "mode"}
    assert kinds(file("new")) == {"new": "create"}
    assert kinds(Observed("a", "whiteout")) == {"a": "delete"}
    assert kinds(Observed("l", "symlink", target="/etc")) == {"l": "symlink"}
    assert kinds(Observed("d", "whiteout")) == dict.fromkeys(("d", "d/x", "d/e", "d/e/y"), "delete")
    assert kinds(Observed("d", "dir", 0o755, opaque=True), file("d/z")) == {
        "d/x": "delete", "d/e": "delete", "d/e/y": "delete", "d/z": "create"}  # fmt: skip
    assert kinds(file("d")) == {"d": "modify", "d/x": "delete", "d/e": "delete", "d/e/y": "delete"}


@pytest.mark.parametrize(
    "layer",
    [
        [file("../x")],
        [file("a/b")],
        [Observed("l", "symlink", target="d"), file("l/x")],
        [file("missing/x")],
        [Observed("n", "other")],
        [file("s", mode=0o4755)],
        [file("a"), file("a")],
        [Observed("l", "symlink", target="")],
        [Observed("d", "whiteout"), file("d/x")],
    ],
)
def test_layers_that_escape_or_contradict_themselves_are_refused(layer):
    with pytest.raises(ChangesetRefused):
        changeset_from_layer(BASE, layer)


@given(
    st.lists(
        st.builds(Observed, st.sampled_from(["a", "d", "d/x", "d/e", "d/e/y", "n", "n/m", "../z", "d/../a"]),
                  st.sampled_from(["file", "dir", "symlink", "whiteout", "other"]), st.integers(0, 0o7777),
                  st.just(0), st.sampled_from(["", "x", "/etc"]), st.booleans(), st.just(SHA)),
        max_size=6,
    )
)  # fmt: skip
def test_any_layer_gives_a_consistent_tree_or_a_refusal(layer):
    try:
        changeset = changeset_from_layer(BASE, layer)
    except ChangesetRefused:
        return
    final = dict(BASE)
    for change in changeset.changes:
        assert change.before == BASE.get(change.path)
        if change.after is None:
            final.pop(change.path)
        else:
            final[change.path] = change.after
    for path in final:
        parent = path.rpartition("/")[0]
        assert not parent or isinstance(final[parent], DirEntry)


def mark(path, after=None, before=None):
    return set(marks_of(Change(path, before, after or FileEntry(0o644, 1, SHA))))


def test_what_people_miss_is_marked():
    assert Mark.HOOK in mark(".git/hooks/pre-commit")
    assert Mark.HOOK in mark("sub/.GIT/Hooks/post-merge")
    assert Mark.AUTORUN in mark(".git/config")
    assert Mark.CI in mark(".github/workflows/x.yml")
    assert Mark.CI in mark("Jenkinsfile")
    assert Mark.AUTORUN in mark("x/.vscode/tasks.json")
    assert Mark.HIDDEN in mark(".env")
    assert Mark.EXECUTABLE in mark("x", FileEntry(0o755, 1, SHA))
    assert Mark.WRITABLE in mark("x", FileEntry(0o666, 1, SHA))
    assert Mark.NAME in mark("p\u0430ypal.py")
    assert Mark.CONTROL in mark("x\u202etxt.exe")
    assert Mark.CONTROL in mark("x\x1b[2K")
    assert Mark.TYPE in mark("x", LinkEntry("y"), FileEntry(0o644, 1, SHA))
    assert Mark.LEAVES in mark("a/l", LinkEntry("../../x"))
    assert Mark.LEAVES in mark("l", LinkEntry("/etc/passwd"))
    assert Mark.LEAVES not in mark("a/l", LinkEntry("../x"))
    assert mark("plain.txt") == set()


@given(st.text())
def test_nothing_that_moves_the_cursor_survives(text):
    shown = visible(text)
    assert all(c.isprintable() for c in shown), shown
    assert visible(shown) == shown


def test_scripts_that_mix_are_noticed():
    assert mixes_scripts("p\u0430ypal")
    assert not mixes_scripts("\u0442\u0435\u0441\u0442")
    assert not mixes_scripts("paypal")


def card_text(changeset, before, after, most=40):
    card = make_card(changeset, before.get, after.get)
    return card, "\n".join(line for _, line in render(card, max_diff_lines=most))


def test_a_card_shows_the_diff_and_says_what_is_cut():
    changeset = Changeset.of([Change("f", FileEntry(0o644, 2, SHA), FileEntry(0o644, 999, OTHER))])
    new = b"".join(b"line %d\n" % i for i in range(100))
    card, text = card_text(changeset, {SHA: b"x\n"}, {OTHER: new})
    assert card.summary.lines_added == 100
    assert "+line 5" in text
    assert "more lines of this diff are not shown" in text
    _, full = card_text(changeset, {SHA: b"x\n"}, {OTHER: new}, None)
    assert "+line 99" in full
    assert "not shown" not in full


def test_what_is_loud_stands_at_the_end_too():
    changeset = Changeset.of([Change(".git/hooks/x", None, FileEntry(0o755, 2, OTHER))])
    _, text = card_text(changeset, {}, {OTHER: b"x\n"})
    assert text.splitlines()[-1].startswith("LOOK TWICE")
    assert ".git/hooks/x" in text.splitlines()[-1]


def test_content_cannot_forge_the_card():
    evil = b"ok\n\x1b[1A\x1b[2Kfake \xe2\x80\xaegnp.exe\r\n"
    changeset = Changeset.of([Change("f", None, FileEntry(0o644, len(evil), OTHER))])
    card, text = card_text(changeset, {}, {OTHER: evil})
    assert Mark.CONTROL in card.items[0].marks
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202e" in text
    assert "\r" not in text


def test_binary_large_and_missing_contents_say_so():
    rows = [
        (FileEntry(0o644, 3, SHA), b"\0\1\2", "binary"),
        (FileEntry(0o644, 1 << 30, SHA), b"", "too large"),
        (FileEntry(0o644, 3, SHA), None, "no longer at hand"),
    ]
    for entry, content, words in rows:
        changeset = Changeset.of([Change("f", None, entry)])
        _, text = card_text(changeset, {}, {SHA: content})
        assert words in text


def test_renames_are_recognised():
    entry = FileEntry(0o644, 3, SHA)
    changeset = Changeset.of([Change("old", entry, None), Change("new", None, entry)])
    assert changeset.renames == {"new": "old"}
    assert "renamed from old" in card_text(changeset, {}, {})[1]


@pytest.mark.parametrize("hidden", ["\ufe01", "\U000e0120", "\u034f", "\u17b4", "\u180b"])
def test_characters_that_show_nothing_are_escaped(hidden):
    assert hidden not in visible(f"a{hidden}b")
    assert Mark.CONTROL in mark(f"a{hidden}b")


def test_a_card_has_a_limit_and_says_what_it_did_not_compare():
    text = b"a\n" * 7900
    entry = FileEntry(0o644, len(text), SHA)
    changeset = Changeset.of([Change(f"g{n:04}", None, entry) for n in range(2000)])
    card, _ = card_text(changeset, {}, {SHA: text})
    assert len(card.items) == 2000
    assert card.items[0].diff
    assert "reached its limit" in card.items[-1].note


def test_a_link_target_that_is_no_name_is_refused():
    with pytest.raises(ChangesetRefused):
        changeset_from_layer(BASE, [Observed("l", "symlink", target="\ud800")])
