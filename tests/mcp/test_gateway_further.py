"""Prompts and resources of many servers behind one address, and what programs are told when a list changes."""

import json
from types import SimpleNamespace

import anyio
import mcp_types as types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.subscriptions import PromptsListChanged, ToolsListChanged

from luminaguard.mcp.gateway.changes import Changes
from luminaguard.mcp.names import Visibility, address_of, resource_at
from luminaguard.testing.gateways import over_http, over_stdio, serving_gateway
from luminaguard.testing.mcp_lab import TOOLS, LabServer, running_lab
from mcp import MCPError

ERAS = ["2026-07-28", "legacy"]
TWO = ("one", "two")
LET = """
[policy]
trusted_servers = ["one", "two"]

[[policy.rules]]
name = "fixtures"
risk = "GREEN"
reason = "They do no harm."
when = { effect = "call", server = ["one", "two"] }
"""


def run(work):
    async def within():
        with anyio.fail_after(60):
            await work()

    anyio.run(within)


@pytest.fixture
def setup(bare_home):
    """Writes the settings of a home with two servers, and a third one; and more."""

    def write(url, more=LET, gateway="", third=""):
        config = bare_home.folder / "config"
        config.mkdir(mode=0o700, exist_ok=True)
        tables = "".join(f'[mcp_servers.{name}]\nurl = "{url}"\ntimeout_s = 10\n' for name in TWO)
        (config / "luminaguard.toml").write_text(
            f"{more}\n{tables}"
            + (f'[mcp_servers.third]\nurl = "{third}"\ntimeout_s = 1\n' if third else "")
            + f"[gateway]\nwait_s = 0.3\n{gateway}"
        )
        return bare_home

    return write


@pytest.mark.parametrize("era", ERAS)
def test_what_servers_have_is_there_under_names_that_say_whose_it_is(setup, fixtures, era):
    home = setup(fixtures, third="http://127.0.0.1:9/mcp")  # nobody is there

    async def work():
        async with over_stdio(home, era=era) as client:
            prompts = [one.name for one in (await client.list_prompts()).prompts]
            assert "one__test_simple_prompt" in prompts and "two__test_simple_prompt" in prompts
            prompt = await client.get_prompt("two__test_prompt_with_arguments", {"arg1": "a", "arg2": "b"})
            assert prompt.messages[0].content.text == "a and b"
            found = [one.uri for one in (await client.list_resources()).resources]
            assert "luminaguard:one/test://static-text" in found and "luminaguard:two/test://static-text" in found
            templates = [one.uri_template for one in (await client.list_resource_templates()).resource_templates]
            assert "luminaguard:one/test://template/{id}/data" in templates
            read = await client.read_resource("luminaguard:two/test://template/7/data")
            assert '"7"' in read.contents[0].text and read.contents[0].uri == "luminaguard:two/test://template/7/data"
            ref = types.PromptReference(type="ref/prompt", name="one__test_prompt_with_arguments")
            completed = await client.complete(ref, {"name": "arg1", "value": "to"})
            assert completed.completion.values == ["toast"]

    run(work)


@pytest.mark.parametrize("era", ERAS)
def test_addresses_in_answers_can_be_read(setup, fixtures, era):
    home = setup(fixtures)

    async def work():
        async with over_stdio(home, era=era) as client:
            answer = await client.call_tool("one__test_embedded_resource", {})
            (embedded,) = (part for part in answer.content if part.type == "resource")
            assert embedded.resource.uri.startswith("luminaguard:one/test://")
            prompt = await client.get_prompt("one__test_prompt_with_embedded_resource", {"resourceUri": "test://x"})
            uris = [one.content.resource.uri for one in prompt.messages if one.content.type == "resource"]
            assert uris == ["luminaguard:one/test://x"]

    run(work)


@pytest.mark.parametrize("era", ERAS)
def test_what_there_is_not_and_what_is_hidden_cannot_be_read(setup, fixtures, era):
    home = setup(fixtures, gateway='hide = ["two__test_*", "two__test:*"]\n')

    async def work():
        async with over_stdio(home, era=era) as client:
            assert not [one for one in (await client.list_prompts()).prompts if one.name.startswith("two__")]
            assert not [one for one in (await client.list_resources()).resources if ":two/" in one.uri]
            for address in ("luminaguard:two/test://static-text", "luminaguard:none/x", "test://static-text",
                            "luminaguard:one/test://there-is-none", "luminaguard:one/"):  # fmt: skip
                with pytest.raises(MCPError):
                    await client.read_resource(address)
            for name in ("two__test_simple_prompt", "one__none", "none__none", "test_simple_prompt"):
                with pytest.raises(MCPError):
                    await client.get_prompt(name)

    run(work)


@pytest.mark.parametrize("era", ERAS)
def test_what_is_read_is_judged_as_a_call_is(setup, fixtures, era):
    home = setup(fixtures, more="")

    async def work():
        async with over_stdio(home, era=era) as client:
            for _ in range(2):
                with pytest.raises(MCPError, match="approval"):
                    await client.read_resource("luminaguard:two/test://static-text")
            with pytest.raises(MCPError, match="approval"):
                await client.get_prompt("one__test_simple_prompt")
            waiting = home.run("approvals", "list", "--json").json["requests"]
            assert sorted(one["command"] for one in waiting) == [["one", "prompts/get"], ["two", "resources/read"]]
            (read,) = (one["id"] for one in waiting if one["command"][0] == "two")
            assert home.run("approvals", "approve", read).code == 0
            with pytest.raises(MCPError, match="approval"):
                await client.read_resource("luminaguard:one/test://static-text")
            found = await client.read_resource("luminaguard:two/test://static-text")
            assert found.contents[0].text == "It never changes."

    run(work)


def test_a_server_that_has_none_is_not_begun_for_them(setup):
    server = LabServer()
    with running_lab(server):
        home = setup(server.url)

        async def work():
            async with over_stdio(home) as client:
                await client.list_tools()
                before = len(server.log)
                assert (await client.list_prompts()).prompts == [] and (await client.list_resources()).resources == []
                assert "prompts/list" not in str(server.log[before:])
            before = len(server.log)
            async with over_stdio(home) as client:  # what it has is remembered
                assert (await client.list_prompts()).prompts == []
                assert len(server.log) == before

        run(work)


def test_programs_are_told_of_a_changed_list_in_the_new_era(setup, fixtures):
    home = setup(fixtures)

    async def work():
        async with over_stdio(home) as client:
            await client.list_prompts()
            async with client.listen(prompts_list_changed=True, tools_list_changed=True) as events:
                await client.call_tool("one__test_trigger_prompt_change", {})
                assert await anext(events) == PromptsListChanged()
                titles = {one.name: one.title for one in (await client.list_prompts()).prompts}
                assert "version 0" not in titles["one__test_simple_prompt"]

    run(work)


class WithPrompts(LabServer):
    """Has prompts, and lists them in the way that it is told to."""

    mode, pages = "good", 0

    def result(self, message):
        method = message["method"]
        found = super().result(message)
        if method == "server/discover":
            found["result"]["capabilities"] |= {"prompts": {}}
        elif method == "prompts/list":
            self.pages += 1
            more = {"nextCursor": f"c{self.pages}"} if self.mode == "endless" else {}
            rows = [{"name": "hello"}] if self.mode == "good" else []
            about = {"prompts": rows, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
            found = {"jsonrpc": "2.0", "id": message["id"], "result": about | more}
        return found


def test_whoever_has_listed_what_nobody_accepted_follows_it(setup):
    server = WithPrompts()
    with running_lab(server):
        home = setup(server.url, more='[policy]\ntrusted_servers = ["two"]\n')

        async def work():
            async with over_stdio(home) as client:
                await client.list_prompts()

        run(work)
        entries = [json.loads(line) for line in home.run("ledger", "export").out.splitlines()[1:]]
        labels = [one["body"]["label"] for one in entries if one["kind"] == "task.tainted"]
        assert labels == ["mcp:one"]  # and not of the one that is trusted


def test_a_list_without_an_end_is_nobody_elses(setup):
    good, bad = WithPrompts(), WithPrompts()
    bad.mode = "endless"
    with running_lab(good, bad):
        home = setup(good.url, third=bad.url)

        async def work():
            async with over_stdio(home) as client:
                for _ in range(2):
                    found = [one.name for one in (await client.list_prompts()).prompts]
                    assert found == ["one__hello", "two__hello"]
                assert 1 < bad.pages <= 100

        run(work)


WAYS = ["file:///home/me/./secret/a", "file:///home/x/../me/secret/a", "file:///home/me/%73ecret/a",
        "FILE:///home/me/secret/a", "file://localhost/home/me/secret/a", "file:////home/me/secret/a",
        "file:///home/me/%2573ecret/a", "file:///home//me/secret/a?x", "file:///home/me\\secret\\a",
        "file:///home/me/secret/a#f"]  # fmt: skip


@pytest.mark.parametrize("uri", WAYS)
def test_what_is_hidden_is_however_its_address_is_written(uri):
    visibility = Visibility(("*",), ("files__file:///home/me/secret/*",))
    assert not visibility.shows_address("files", uri) and visibility.shows_address("other", uri)
    assert visibility.shows_address("files", "file:///home/me/open/a")


def test_a_flood_of_notices_is_told_once_in_a_while_and_a_client_that_does_not_read_holds_up_nobody():
    class Client:
        def __init__(self, *, reads):
            self.reads, self.told = reads, 0

        async def send_notification(self, _notice):
            self.told += 1
            if not self.reads:
                await anyio.sleep_forever()

    async def work():
        changes = Changes()
        stuck, well = Client(reads=False), Client(reads=True)
        for name, client in (("a", stuck), ("b", well)):
            request = SimpleNamespace(headers={"mcp-session-id": name})
            changes.meet(SimpleNamespace(protocol_version="2025-11-25", request=request, session=client))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(changes.tell)
            for _ in range(20_000):
                changes.note("prompts")
            while not well.told:
                await anyio.sleep(0.01)
            assert (stuck.told, well.told) == (1, 1)
            tasks.cancel_scope.cancel()

    run(work)


def listening(told):
    async def hear(message):
        told.append(type(message).__name__)

    return hear


@pytest.mark.parametrize("over", ["stdio", "http"])
def test_programs_are_told_of_a_changed_list_in_the_older_era(setup, fixtures, over):
    home, told = setup(fixtures), []
    token = home.run("gateway", "token", "suite").out.strip()

    async def changed(client):
        await client.list_prompts()
        await client.call_tool("one__test_trigger_prompt_change", {})
        while "PromptListChangedNotification" not in told:
            await anyio.sleep(0.02)

    async def work():
        if over == "stdio":
            async with over_stdio(home, era="legacy", message_handler=listening(told)) as client:
                await changed(client)
        else:
            with serving_gateway(home) as url:
                async with over_http(url, token, "legacy", message_handler=listening(told)) as client:
                    await changed(client)

    run(work)


@pytest.mark.parametrize("era", ERAS)
def test_programs_are_told_of_tools_that_a_person_has_accepted(setup, era):
    server, told = LabServer(), []
    with running_lab(server):
        home = setup(server.url)

        async def until_told(client):
            if era == "legacy":
                while "ToolListChangedNotification" not in told:
                    await anyio.sleep(0.02)
                return
            async with client.listen(tools_list_changed=True) as events:
                home.run("mcp", "accept", "one", "--yes")
                assert await anext(events) == ToolsListChanged()

        async def work():
            async with over_stdio(home, era=era, message_handler=listening(told)) as client:
                assert "one__new" not in [tool.name for tool in (await client.list_tools()).tools]
                server.tools = (*TOOLS, TOOLS[1] | {"name": "new"})
                if era == "legacy":
                    assert home.run("mcp", "accept", "one", "--yes").code == 0
                await until_told(client)
                assert "one__new" in [tool.name for tool in (await client.list_tools()).tools]

        run(work)


@given(st.sampled_from(["a", "one-two", "a_b"]), st.text(min_size=1))
def test_an_address_leads_back_to_what_it_was_made_of(server, uri):
    assert resource_at(address_of(server, uri)) == (server, uri)


@given(st.text())
def test_any_other_address_leads_nowhere_or_back(address):
    found = resource_at(address)
    assert found is None or address_of(*found) == address
