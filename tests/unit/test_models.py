"""Models over their real wire protocols, against a server that misbehaves: each fault ends as it should."""

import json

import anyio
import anyio.lowlevel
import pytest

from luminaguard.actions.tools import ToolSpec
from luminaguard.errors import LuminaGuardError, ModelRefused, ModelUnavailable, SettingsError
from luminaguard.reasoning import Message, ToolCall, providers
from luminaguard.reasoning.choice import Choice, find_key, keep_key, parse_choices, what_would_work
from luminaguard.reasoning.messages import parse_arguments
from luminaguard.reasoning.providers import open_provider
from luminaguard.reasoning.retry import Passing, Persistent
from luminaguard.testing.model_server import Answer, Cut, Hang, Raw, Status, serve_models

TOOLS = [ToolSpec("shell", "Run it.", {"type": "object", "properties": {"command": {"type": "string"}},
                                       "required": ["command"]})]  # fmt: skip
ASKED = [Message("user", "Do it.")]
CALLED = [*ASKED, Message("assistant", "I look.", (ToolCall("call_0", "shell", {"command": "ls"}),)),
          Message("tool", "a\nb", call_id="call_0", tool="shell")]  # fmt: skip
KEY = "sk-secret-0123456789"


def ask(behaviours, *, provider="openai", history=ASKED, tools=TOOLS):
    """One turn against a server that does these things; the turn, what was streamed, the waits, the requests."""

    async def run():
        streamed, waits = [], []

        async def sleep(seconds):
            waits.append(seconds)

        async with serve_models(behaviours) as server:
            url = server.anthropic if provider == "anthropic" else server.openai
            async with open_provider(Choice(provider, "test-model", url), KEY) as model:
                persistent = Persistent([model], sleep, lambda: 0.5)
                try:
                    turn = await persistent.turn("Be brief.", history, tools, streamed.append)
                except LuminaGuardError as error:
                    turn = error
                    error.seen, error.waits = server.requests, waits
        return turn, streamed, waits, server.requests

    turn, *rest = anyio.run(run)
    if isinstance(turn, Exception):
        raise turn
    return turn, *rest


BOTH = pytest.mark.parametrize("provider", ["openai", "anthropic"])


@BOTH
def test_an_answer_is_streamed_with_its_calls_and_its_cost(provider):
    answer = Answer("I look at the files.", (("shell", '{"command": "ls -l"}'), ("shell", '{"command": "pwd"}')))
    turn, streamed, waits, requests = ask([answer], provider=provider)
    assert "".join(streamed) == turn.message.text == "I look at the files."
    assert len(streamed) > 1 and waits == []
    assert [(call.name, dict(call.arguments)) for call in turn.message.calls] == [
        ("shell", {"command": "ls -l"}), ("shell", {"command": "pwd"})]  # fmt: skip
    assert (turn.usage.requests, turn.usage.input_tokens, turn.usage.output_tokens) == (1, 100, 20)
    assert (turn.usage.tool_calls, turn.usage.dollars) == (2, 0.0)  # a server on this machine costs nothing
    _, headers, body = requests[0]
    assert KEY in (headers.get("authorization", "") + headers.get("x-api-key", ""))
    assert "Be brief." in str(body) and "shell" in str(body["tools"]) and KEY not in str(body)


@BOTH
def test_a_history_with_results_is_sent_again_whole(provider):
    turn, *_, requests = ask([Answer("Done.")], provider=provider, history=CALLED)
    body = str(requests[0][2]["messages"])
    assert turn.message.calls == () and all(word in body for word in ("Do it.", "I look.", "call_0", "ls", "a\\nb"))


@BOTH
def test_arguments_that_are_no_json_are_told_and_nothing_is_guessed(provider):
    turn, *_ = ask([Answer("", (("shell", '{"command": "rm'),))], provider=provider)
    (call,) = turn.message.calls
    assert (dict(call.arguments), bool(call.malformed)) == ({}, True)
    history = [*ASKED, turn.message, Message("tool", "no", call_id=call.id, tool="shell")]
    again, *_, requests = ask([Answer("Sorry.")], provider=provider, history=history)
    assert again.message.text == "Sorry." and "rm" in str(requests[0][2])


@BOTH
@pytest.mark.parametrize("fault", [Status(429, (("retry-after", "7"),)), Status(500), Status(503), Status(529),
                                   Cut(Answer("half of a sentence that goes on"), 3)], ids=str)  # fmt: skip
def test_what_may_pass_is_asked_again_after_a_while(provider, fault):
    turn, streamed, waits, requests = ask([fault, Answer("Here it is.")], provider=provider)
    assert turn.message.text == "Here it is." and len(requests) == 2
    assert "".join(streamed).endswith("Here it is.") and "" in streamed  # the half that came does not count
    assert waits == [7.0] if isinstance(fault, Status) and fault.headers else 0 < waits[0] < 2


@BOTH
def test_what_does_not_pass_ends_after_some_attempts(provider):
    with pytest.raises(ModelUnavailable, match="503") as caught:
        ask([Status(503)], provider=provider)
    assert len(caught.value.seen) == 4 and len(caught.value.waits) == 3
    assert caught.value.waits == sorted(caught.value.waits)
    assert "resume" in caught.value.hint


@BOTH
@pytest.mark.parametrize(("code", "hint"), [(401, "key"), (403, "key"), (404, "name"), (400, "says")])
def test_what_will_not_be_better_is_not_asked_again(provider, code, hint):
    body = f'{{"error": {{"message": "no: {KEY}", "type": "invalid_request_error"}}}}'
    with pytest.raises(ModelRefused, match=str(code)) as caught:
        ask([Status(code, (), body)], provider=provider)
    assert len(caught.value.seen) == 1 and hint in caught.value.hint
    assert KEY not in caught.value.message and "(the key)" in caught.value.message


@BOTH
def test_a_wait_that_is_too_long_is_not_made(provider):
    with pytest.raises(ModelUnavailable) as caught:
        ask([Status(429, (("retry-after", "3600"),))], provider=provider)
    assert caught.value.waits == []


@BOTH
@pytest.mark.parametrize("after", [0, 3])
def test_silence_ends(provider, after, monkeypatch):
    monkeypatch.setattr(providers, "_SILENCE_S", 0.2)
    monkeypatch.setattr(providers, "_REQUEST_S", 2.0)
    turn, *_, requests = ask(
        [Hang(Answer("a long sentence that never ends"), after), Answer("Now.")], provider=provider
    )
    assert turn.message.text == "Now." and len(requests) == 2


@BOTH
def test_a_slow_drip_has_an_end(provider, monkeypatch):
    monkeypatch.setattr(providers, "_REQUEST_S", 0.5)
    drip = Raw((b": still here\n\n",) * 100, 0.05)
    turn, *_, requests = ask([drip, Answer("Now.")], provider=provider)
    assert turn.message.text == "Now." and len(requests) == 2


@BOTH
@pytest.mark.parametrize("pieces", [(b"data: {\n\n",), (b"\xff\xfe\x00garbage",), (b"",), (b"data: [1, 2]\n\n",),
                                    (b"event: nonsense\ndata: {}\n\n",)], ids=str)  # fmt: skip
def test_garbage_is_no_answer(provider, pieces):
    with pytest.raises((ModelUnavailable, ModelRefused)):
        ask([Raw(pieces)], provider=provider)


@BOTH
def test_an_answer_without_end_is_refused(provider, monkeypatch):
    monkeypatch.setattr(providers, "_MOST_TEXT", 10_000)
    with pytest.raises(ModelRefused, match="more than"):
        ask([Answer("x" * 1_000_000)], provider=provider)


def test_a_refusal_of_the_model_is_a_refusal():
    with pytest.raises(ModelRefused, match="refuses to answer"):
        ask([Answer("I can", finish="content_filter")])


@BOTH
def test_an_answer_that_was_cut_is_not_taken_for_a_whole_one(provider):
    finish = "length" if provider == "openai" else "max_tokens"
    with pytest.raises(ModelRefused, match="cut at its limit") as caught:
        ask([Status(500), Answer("I will now", finish=finish)], provider=provider)
    assert caught.value.requests == 2
    if provider == "anthropic":
        assert caught.value.args and ask([Answer("x")], provider=provider)[3][0][2]["max_tokens"] == 16_000


def test_failed_answers_count(monkeypatch):
    turn, *_ = ask([Status(500), Status(500), Answer("x")])
    assert turn.usage.requests == 3
    with pytest.raises(ModelUnavailable) as caught:
        ask([Status(500)])
    assert caught.value.requests == 4


def test_the_next_model_is_asked_when_one_does_not_answer_and_first_from_then_on():
    told = []

    async def run():
        async with (serve_models([Status(500)]) as broken, serve_models([Answer("I do.")]) as works,
                    open_provider(Choice("openai", "a", broken.openai), "") as one,
                    open_provider(Choice("anthropic", "b", works.anthropic), "k") as two):  # fmt: skip
            both = Persistent([one, two], lambda _: anyio.lowlevel.checkpoint(), note=told.append)
            turns = [await both.turn("", ASKED, TOOLS) for _ in range(2)]
            return turns, len(broken.requests)

    turns, asked = anyio.run(run)
    assert [turn.message.text for turn in turns] == ["I do."] * 2 and turns[0].model.startswith("anthropic:b@")
    assert asked == 4 and len(told) == 1 and "asking anthropic:b" in told[0]


def test_nothing_listens():
    choice = Choice("openai", "x", "http://127.0.0.1:9/v1")

    async def run():
        async with open_provider(choice, "") as model:
            await Persistent([model], lambda _: anyio.lowlevel.checkpoint()).turn("", ASKED, [])

    with pytest.raises(ModelUnavailable):
        anyio.run(run)


@BOTH
def test_a_history_with_halves_of_characters_is_asked_all_the_same(provider):
    history = [Message("user", "caf\udce9 \ud800"), Message("assistant", "", (ToolCall("\ud800", "shell", {}),)),
               Message("tool", "\ud800", call_id="\ud800", tool="shell")]  # fmt: skip
    turn, *_, requests = ask([Answer("Fine.")], provider=provider, history=history)
    assert turn.message.text == "Fine." and len(requests) == 1


# -- which model -------------------------------------------------------------------------------------------------


def test_choices_as_people_write_them():
    first, second = parse_choices("anthropic:claude-x, openai:qwen/3:8b@http://127.0.0.1:8080/v1")
    assert (first.provider, first.name, first.url, first.is_local) == ("anthropic", "claude-x", "", False)
    assert (second.name, second.is_local) == ("qwen/3:8b", True)
    assert str(second) == "openai:qwen/3:8b@http://127.0.0.1:8080/v1"
    assert parse_choices("ollama:llama3")[0].url == "http://127.0.0.1:11434/v1"
    assert parse_choices("script:a/b.yaml")[0] == Choice("script", "a/b.yaml")


@pytest.mark.parametrize("text", ["", "gpt", "openai:", "nobody:x", "openai:a b", "openai:x@ftp://h", "openai:x@http://",
                                  "openai:x@http://user:pw@127.0.0.1/v1", "openai:x@http://example.org/v1", "script:",
                                  "openai:x@http://127.0.0.1/?q=1", "openai:\u202ex", "openai:x@http://[", "openai:x@https://h:99999",
                                  "openai:x@https://:secret@h", "openai:x@https://h/a b", "openai:x@https://h\n/v1", "openai:x@http://240.0.0.1",
                                  "openai:x@http://192.0.2.1/v1", "openai:x@https://h#f"])  # fmt: skip
def test_what_names_no_model(text):
    with pytest.raises(SettingsError):
        parse_choices(text)


@pytest.fixture
def ring(monkeypatch):
    """A keyring of the process: the system's is nothing for a test to write to."""
    import keyring
    from keyring.backend import KeyringBackend

    class Ring(KeyringBackend):
        priority = 1

        def __init__(self):
            self.kept = {}

        def get_password(self, service, username):
            return self.kept.get((service, username))

        def set_password(self, service, username, password):
            self.kept[service, username] = password

    old, ring = keyring.get_keyring(), Ring()
    keyring.set_keyring(ring)
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    yield ring
    ring.kept.clear()
    keyring.set_keyring(old)


def test_keys_come_from_the_environment_or_the_keyring(ring, monkeypatch):
    choice = Choice("anthropic", "x")
    with pytest.raises(ModelUnavailable, match="no key for anthropic") as caught:
        find_key(choice)
    assert "ANTHROPIC_API_KEY" in caught.value.hint
    keep_key("anthropic", "from-the-ring")
    assert find_key(choice) == "from-the-ring"
    monkeypatch.setenv("ANTHROPIC_API_KEY", "from-the-environment")
    assert find_key(choice) == "from-the-environment"
    assert find_key(Choice("openai", "x", "http://127.0.0.1:1/v1")) == ""  # a server here may need none
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    assert find_key(Choice("openai", "x", "https://elsewhere.example/v1")) == ""  # a provider's key is for it alone
    monkeypatch.setenv("LUMINAGUARD_MODEL_KEY", "of-the-server")
    for url, key in (("https://elsewhere.example/v1", "of-the-server"), ("http://127.0.0.1:1/v1", "of-the-server"),
                     ("http://10.0.0.7/v1", "")):  # fmt: skip
        assert find_key(Choice("openai", "x", url)) == key
    with pytest.raises(SettingsError):
        keep_key("ollama", "x")
    assert "anthropic:MODEL (a key is set)" in what_would_work()


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "found"), [("", {}), (" ", {}), ('{"a": 1}', {"a": 1})])
def test_arguments_that_can_be_read(text, found):
    assert parse_arguments(text) == (found, "")


@pytest.mark.parametrize("text", ["{", "[]", "1", '"x"', "{'a': 1}", "{" * 100_000, '{"a": 1}{"b": 2}', "null",
                                  '{"a": "\\ud800"}', '{"\\udce9": 1}', '{"a":' * 70 + "1" + "}" * 70,
                                  '{"a": ' + "9" * 5000 + "}"])  # fmt: skip
def test_arguments_that_cannot(text):
    found, wrong = parse_arguments(text)
    assert found == {} and wrong


def test_passing_says_how_long():
    assert Passing("why", 3.0).after_s == 3.0


def test_a_turn_of_googles_protocol_has_its_text_calls_and_cost():
    """The server plays the wire format of generativelanguage's streamGenerateContent."""
    first = {"candidates": [{"content": {"role": "model", "parts": [{"text": "I look "}]}, "index": 0}]}
    second = {
        "candidates": [{"content": {"role": "model", "parts": [
            {"text": "at it."}, {"functionCall": {"name": "shell", "args": {"command": "ls"}}},
        ]}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 20, "totalTokenCount": 120},
    }  # fmt: skip
    pieces = tuple(b"data: " + json.dumps(one).encode() + b"\r\n\r\n" for one in (first, second))
    turn, streamed, waits, requests = ask([Raw(pieces)], provider="google")
    assert "".join(streamed) == turn.message.text == "I look at it." and waits == []
    assert [(call.name, dict(call.arguments)) for call in turn.message.calls] == [("shell", {"command": "ls"})]
    assert turn.usage.tokens == 120
    (path, headers, body), = requests  # fmt: skip
    assert path.endswith("/models/test-model:streamGenerateContent") and headers["x-goog-api-key"] == KEY
    assert body["tools"][0]["functionDeclarations"][0]["name"] == TOOLS[0].name
    assert "Be brief." in json.dumps(body["systemInstruction"])


def test_googles_refusals_are_asked_again_or_told():
    busy = Status(429, (("retry-after", "1"),), '{"error": {"code": 429, "message": "slow", "status": "X"}}')
    done = {"candidates": [{"content": {"role": "model", "parts": [{"text": "Yes."}]}, "finishReason": "STOP"}]}
    piece = b"data: " + json.dumps(done).encode() + b"\r\n\r\n"
    turn, _, waits, _ = ask([busy, Raw((piece,))], provider="google")
    assert turn.message.text == "Yes." and len(waits) == 1
    wrong = Status(400, (), '{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}')
    with pytest.raises(ModelRefused) as caught:
        ask([wrong], provider="google")
    assert KEY not in str(caught.value)
