"""What a server asks the person at the terminal, on a real one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.cli.questions import understood

LET = """
[[policy.rules]]
name = "fixtures"
risk = "GREEN"
reason = "They do no harm."
when = { effect = "call", server = "fixtures" }

[policy]
trusted_servers = ["fixtures"]
"""


@pytest.fixture
def call(home, fixtures, on_a_terminal):
    """Calls a tool of it at a terminal."""
    config = home.folder / "config"
    config.mkdir(mode=0o700, exist_ok=True)
    (config / "luminaguard.toml").write_text(f'{LET}\n[mcp_servers.fixtures]\nurl = "{fixtures}"\ntimeout_s = 30\n')
    return lambda tool, arguments="{}": on_a_terminal("mcp", "call", "fixtures", tool, arguments)


def test_a_person_answers_and_the_call_goes_on(call):
    with call("test_elicitation", '{"message": "Who\\u001b[2J are you?"}') as at:
        asked = at.until(b"username")
        assert b"asks: Who" in asked and b"\x1b[2J" not in asked and b"no passwords" in asked
        at.type("ann\n")
        at.until(b"email")
        at.type("a@x.example\n")
        assert b"username = ann" in at.until(b"[y/N]")
        at.type("y\n")
        assert b"a@x.example" in at.until(b"a@x.example")
        assert at.wait() == 0


@pytest.mark.parametrize(("keys", "said"), [("n\n", b"decline"), ("\x04", b"cancel")])
def test_a_person_does_not_answer(call, keys, said):
    with call("test_elicitation", '{"message": "Who?"}') as at:
        at.until(b"username")
        at.type("ann\nb\n")
        at.until(b"[y/N]")
        at.type(keys)
        at.until(said)
        assert at.wait() == 0


def test_ctrl_c_ends_a_question(call):
    with call("test_elicitation", '{"message": "Who?"}') as at:
        at.until(b"username")
        at.type("\x03")
        assert at.wait() == 130


def test_choices_are_made_by_their_numbers(call):
    with call("test_elicitation_sep1330_enums") as at:
        lists = [b"3: option3: ", b"3: Option 3: ", b"2: Option 2: ", b"3: option3: ", b"3: Option 3: "]
        for last in lists[:3]:  # one of each
            at.until(last)
            at.type("9\n")
            at.until(b"A number of the list.")
            at.type("1\n")
        for last in lists[3:]:  # some of each
            at.until(last)
            at.type("1, 2\n")
        assert b"[y/N]" in at.until(b"[y/N]")
        at.type("y\n")
        at.until(b"accept")
        assert at.wait() == 0


FIELDS = st.fixed_dictionaries({}, optional={
    "type": st.sampled_from(["string", "integer", "number", "boolean", "array", "odd"]),
    "enum": st.lists(st.text(max_size=3), max_size=3), "minimum": st.integers(-5, 5), "maximum": st.integers(-5, 5),
    "minLength": st.integers(0, 3), "maxLength": st.integers(0, 5), "enumNames": st.lists(st.text(max_size=2)),
    "items": st.fixed_dictionaries({"enum": st.lists(st.text(max_size=3), max_size=3)}),
    "oneOf": st.lists(st.fixed_dictionaries({"const": st.text(max_size=2), "title": st.text(max_size=2)}), max_size=2),
})  # fmt: skip


@given(FIELDS, st.text(max_size=8))
def test_whatever_is_typed_is_a_value_of_the_field_or_a_reason(field, text):
    value, why = understood(field, text)
    assert (value is None) == bool(why)
    if not why and field.get("type") == "integer" and not field.get("enum") and not field.get("oneOf"):
        assert isinstance(value, int) or field.get("items")
