"""One request in full screen: why it is asked, what it would do, and the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Footer, Input, Label, Static
from textual.worker import get_current_worker

from luminaguard.actions.model import Severity
from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.approvals.words import CONFIRM, duration, heading
from luminaguard.effects.marks import LOUD
from luminaguard.effects.text import visible
from luminaguard.errors import LuminaGuardError, PolicyChanged
from luminaguard.runtime.decisions import OWNER, Again, Answer
from luminaguard.tui.desk import OpenCard, Raw
from luminaguard.tui.dialogs import AskText, ShowText
from luminaguard.tui.rows import Row, unified
from luminaguard.tui.screens import POLL_S, CliffScreen, told
from luminaguard.tui.views import ChangeTree, ChangeView

__all__ = ["Review"]

_HOUR_S = 3600
_MOST_LOUD = 5000


class Review(CliffScreen):
    """One request: why it is asked, what it would do, and the answer."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "approve", " Approve"), Binding("d", "deny", " Deny"), Binding("c", "changes", " Change"),
        Binding("s", "stop", " Stop"), Binding("g", "grant", " Again"), Binding("v", "columns", " Cols"),
        Binding("slash", "search", " Find", key_display="/"), Binding("n", "next_match", "Next", show=False),
        Binding("N", "previous_match", "Previous", show=False), Binding("i", "why", " Why"),
        Binding("p", "person", "Answer as", show=False), Binding("tab", "app.focus_next", "Side", show=False),
        Binding("escape,q", "back", " Back", key_display="q"),
    ]  # fmt: skip

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request
        self._card: OpenCard | None = None
        self._busy = False
        self._approved_by: tuple[str, ...] = ()
        self._now_ns = 0
        """When the database was last looked at; never from here, where waiting for it would stop the screen."""
        self._as = Answer(Verdict.DENY, "terminal")
        """Whose answer it will be."""
        self._searching: bool | None = None
        """Backwards or not, while a change is opened for what was searched for."""

    # -- what is shown --------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """The reasons above, the card below."""
        yield Label("", id="what", markup=False)
        with VerticalScroll(id="reasons"):
            yield Static("", id="heading", markup=False)
            yield Static("", id="loud", markup=False)
        yield Horizontal(id="card")
        with Vertical(id="search-line", classes="hidden"):
            yield Input(placeholder="search in this change, then in the following ones", id="search")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Show the reasons at once, the card when it is open."""
        self._show_heading()
        self._open()
        self.set_interval(POLL_S, self._check)

    def on_unmount(self) -> None:
        """Let go of the contents."""
        if self._card is not None:
            self._card.close()

    def _show_heading(self) -> None:
        if not self.is_mounted:
            return
        what, *lines = [text for _, text in heading(self._request, self._now_ns, self._approved_by)]
        self.query_one("#what", Label).update(what)
        if self._card is not None:
            lines.append(f"{self._card.title}   {self._card.digest[:26]}…")
            facts = sorted(self._card.facts, key=lambda fact: not fact.loud)
            lines += [f"{'! ' if fact.loud else ''}{fact.label}: {fact.value}" for fact in facts]
        if self._as.person != OWNER:
            lines.append(f"answering as {self._as.person}")
        elif self._request.judged.people > 1:
            lines.append("p: answer as another person")
        self.query_one("#heading", Static).update("\n".join(lines))
        severe = self._request.judged.severity in {Severity.HIGH, Severity.CRITICAL}
        self.query_one("#heading").set_class(severe, "severe")

    @work(thread=True, exclusive=True, group="open")
    def _open(self) -> None:
        try:
            card = self.desk.open(self._request)
            self._approved_by, self._now_ns = self.desk.approved_by(self._request), self.desk.now_ns()
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on waiting, and can be looked at
            self.app.call_from_thread(self._refused, error)
            return
        self.app.call_from_thread(self._opened, card)

    def _opened(self, card: OpenCard) -> None:
        if not self.is_mounted:
            card.close()
            return
        self._card = card
        self._show_heading()
        tree = ChangeTree(card)
        self.query_one("#card").mount(ChangeView())
        self.query_one("#card").mount(tree, before=0)
        tree.focus()
        self._look_twice(card)

    @work(thread=True, exclusive=True, group="loud")
    def _look_twice(self, card: OpenCard) -> None:
        """What needs a second look, told above the card; of very many changes, of the first ones."""
        loud = []
        for index in range(min(len(card), _MOST_LOUD)):
            if get_current_worker().is_cancelled:
                return
            item = card.outline(index)
            if LOUD & set(item.marks):
                loud.append(f"! [{', '.join(mark.value for mark in item.marks if mark in LOUD)}] {item.path}")
        more = len(card) - _MOST_LOUD
        words = [f"LOOK TWICE at {len(loud)} of {len(card)}:", *loud[:4]] if loud else []
        words += [f"  and {len(loud) - 4} more, marked with ! on the left"] if len(loud) > 4 else []
        words += [f"{more:,} more changes were not searched for what is loud"] if more > 0 else []
        self.app.call_from_thread(self.query_one("#loud", Static).update, "\n".join(words))

    def on_change_tree_chosen(self, event: ChangeTree.Chosen) -> None:
        """Show the change that the tree is at."""
        self._show_change(event.index)

    @work(thread=True, exclusive=True, group="change")
    def _show_change(self, index: int) -> None:
        card = self._card
        if card is None:
            return
        try:
            item = card.item(index)
            raw = card.raw(index) if item.note and not item.diff else None
        except Exception as error:  # noqa: BLE001  # as above
            self.app.call_from_thread(self._refused, error)
            return
        rows = unified(item)
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._shown, card.paths[index], rows, raw)

    def _shown(self, name: str, rows: list[Row], raw: Raw | None) -> None:
        for view in self.query(ChangeView):
            view.show(name, rows, raw)
            if self._searching is not None:  # it is shown for what was searched for
                view.find_next(backwards=self._searching)
                self._searching = None

    def on_change_tree_toggled(self, event: ChangeTree.Toggled) -> None:
        """Leave a change out of the approval, or take it in again, with what goes along."""
        tree, card = self.query_one(ChangeTree), self._card
        if card is None or card.changeset is None:
            self.notify("Only a changeset has parts.", severity="warning")
            return
        if event.index in tree.left_out:
            tree.left_out -= card.with_needed(event.index)
        else:
            tree.left_out |= card.with_dependent(event.index)
        tree.refresh()
        kept = len(card) - len(tree.left_out)
        self.notify(f"{kept} of {len(card)} changes would be approved", timeout=1.5)

    # -- other processes --------------------------------------------------------------------------------

    @work(thread=True, exclusive=True, group="check")
    def _check(self) -> None:
        """Another process may have decided."""
        if self._busy:
            return
        try:
            now, approved_by = self.desk.state(self._request), self.desk.approved_by(self._request)
            self._now_ns = self.desk.now_ns()
        except LuminaGuardError:
            return
        if approved_by != self._approved_by:
            self._approved_by = approved_by
            self.app.call_from_thread(self._show_heading)
        if now.state is not State.PENDING and not self._busy:
            self.app.call_from_thread(self._gone, now)

    def _gone(self, now: Request) -> None:
        if not self._busy and self.is_current:
            self.notify(f"{now.id} is {now.state.value}: it was answered elsewhere, or its time was over.", timeout=6)
            self._leave(None)

    # -- answers ----------------------------------------------------------------------------------------

    def action_back(self) -> None:
        """Leave it waiting; out of a search, only back to the card."""
        line = self.query_one("#search-line")
        if not line.has_class("hidden"):
            line.add_class("hidden")
            self.query_one(ChangeView).focus()
            return
        self._leave(None)

    @work
    async def action_approve(self) -> None:
        """Approve all, or the part that is ticked."""
        await self._approve(None)

    @work(thread=True, exclusive=True, group="grant")
    def action_grant(self) -> None:
        """Approve, and grant the same for what comes again."""
        if self._request.judged.severity is Severity.CRITICAL:
            self.app.call_from_thread(self.notify, "What is critical is asked for each time.", severity="warning")
            return
        try:
            lines = self.desk.scope(self._request)
        except Exception as error:  # noqa: BLE001  # as above
            self.app.call_from_thread(self._refused, error)
            return
        self.app.call_from_thread(self._ask_for_a_grant, lines)

    @work
    async def _ask_for_a_grant(self, lines: list[str]) -> None:
        text = "Without asking, within exactly this:\n\n" + "\n".join(lines)
        question = "Grant: how often, during how many hours?"
        given = await self.app.push_screen_wait(AskText(question, text, initial="10 8"))
        if given is None:
            return
        try:
            uses, hours = (int(word) for word in given.split())
        except ValueError:
            self.notify("Two numbers: how often, and for how many hours.", severity="warning")
            return
        await self._approve(Again(uses, hours * _HOUR_S))

    async def _approve(self, again: Again | None) -> None:
        if self._card is None:
            self.notify("Not opened yet.", severity="warning")
            return
        if self._request.judged.severity is Severity.CRITICAL:
            reason = f"CRITICAL: {visible(self._request.judged.reason)}\nType '{CONFIRM}' to go on."
            if await self.app.push_screen_wait(AskText("A second step", reason, must_be=CONFIRM)) is None:
                return
        part = None
        if left_out := self.query_one(ChangeTree).left_out:
            part = tuple(path for index, path in enumerate(self._card.paths) if index not in left_out)
        self._answer(replace(self._as, verdict=Verdict.APPROVE, part=part), again)

    @work
    async def action_deny(self) -> None:
        """Deny, with a reason for the agent."""
        await self._say_no(Verdict.DENY, "Deny: why? (the agent reads it; may be empty)")

    @work
    async def action_changes(self) -> None:
        """Ask for changes."""
        await self._say_no(Verdict.RETURN, "What should be different? (the agent reads it)")

    @work
    async def action_stop(self) -> None:
        """Stop the task."""
        if not self._request.task:
            self.notify("It belongs to no task: deny it.", severity="warning")
            return
        await self._say_no(Verdict.STOP, "Stop the task: why? (may be empty)")

    async def _say_no(self, verdict: Verdict, question: str) -> None:
        reason = await self.app.push_screen_wait(AskText(question))
        if reason is not None:
            self._answer(replace(self._as, verdict=verdict, reason=reason), None)

    @work
    async def action_person(self) -> None:
        """Answer as another person than the owner of this installation."""
        names = [OWNER, *self.desk.people()]
        text = f"One of: {', '.join(names)}" if len(names) > 1 else "Nobody else may: luminaguard approvers add NAME"
        name = await self.app.push_screen_wait(AskText("Who answers?", text, initial=self._as.person))
        if name in {None, "", OWNER}:
            self._as = replace(self._as, person=OWNER, key=None)
            self._show_heading()
            return
        assert name is not None
        phrase = await self.app.push_screen_wait(AskText(f"Passphrase of {name}", secret=True))
        if phrase is not None:
            self._unlock(name, phrase)

    @work(thread=True, exclusive=True, group="unlock")
    def _unlock(self, name: str, phrase: str) -> None:
        try:
            key = self.desk.unlock(name, phrase)
        except LuminaGuardError as error:
            self.app.call_from_thread(self.notify, told(error), severity="error", timeout=10, markup=False)
            return
        self._as = replace(self._as, person=name, key=key)
        self.app.call_from_thread(self._show_heading)

    def _answer(self, answer: Answer, again: Again | None) -> None:
        if self._busy:
            return
        if self.desk.only is not None and again is None:
            self._leave(answer)  # whoever asked carries it out
            return
        self._busy = True
        self._carry_out(answer, again)

    @work(thread=True, group="answer")
    def _carry_out(self, answer: Answer, again: Again | None) -> None:
        try:
            words = self.desk.carry_out(self._request, answer, again)
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on waiting, and can be looked at
            self.app.call_from_thread(self._refused, error)
            return
        self.app.call_from_thread(self._done, words)

    def _done(self, words: str) -> None:
        self.notify(words, timeout=5, markup=False)
        while not self.is_current and len(self.app.screen_stack) > 1:  # a dialog that was opened meanwhile
            self.app.pop_screen()
        self._leave(None)

    def _refused(self, error: Exception) -> None:
        self._busy = False
        self.notify(told(error), severity="error", timeout=10, markup=False)
        if isinstance(error, PolicyChanged):  # what it says now is shown, and asked again
            self._request = self.desk.state(self._request)
            self._show_heading()

    def _leave(self, answer: Answer | None) -> None:
        if self.desk.only is not None:
            self.app.exit(answer)
        elif self.is_current:
            self.app.pop_screen()

    # -- looking ------------------------------------------------------------------------------------------

    def action_columns(self) -> None:
        """One column, or two."""
        for view in self.query(ChangeView):
            view.toggle_columns()

    @work(thread=True, group="story")
    def action_why(self) -> None:
        """What happened so far, and which rules were looked at."""
        try:
            now, told, steps = self.desk.now_ns(), self.desk.story(self._request), self.desk.steps(self._request)
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on waiting, and can be looked at
            self.app.call_from_thread(self._refused, error)
            return
        lines = ["What happened so far", ""]
        lines += [f"{duration((now - time_ns) / 1e9):>7} ago  {visible(words)}" for time_ns, words in told]
        lines += ["", "The rules that were looked at, in their order", ""]
        lines += [visible(f"{' ' if s.why else '='} {s.rule}: {s.why or 'matches'}   ({s.origin})") for s in steps]
        text = "\n".join(lines)
        self.app.call_from_thread(self.app.push_screen, ShowText(f"Why {self._request.id} is asked", text))

    def action_search(self) -> None:
        """Ask for a text."""
        if not self.query(ChangeView):
            return
        self.query_one("#search-line").remove_class("hidden")
        self.query_one("#search", Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Search for it."""
        self.query_one("#search-line").add_class("hidden")
        self.query_one(ChangeView).wanted = event.value
        self.query_one(ChangeView).focus()
        self.query_one(ChangeView).at = -1
        if event.value:
            self._jump(backwards=False)

    def action_next_match(self) -> None:
        """The next row that has it."""
        self._jump(backwards=False)

    def action_previous_match(self) -> None:
        """The one before."""
        self._jump(backwards=True)

    def _jump(self, *, backwards: bool) -> None:
        view = self.query_one(ChangeView)
        if view.wanted and not view.find_next(backwards=backwards):
            self._search_on(view.wanted, self.query_one(ChangeTree).index, backwards)

    @work(thread=True, exclusive=True, group="search")
    def _search_on(self, text: str, index: int, backwards: bool) -> None:
        """Search in the other changes, one by one, as they are compared."""
        card, wanted = self._card, text.casefold()
        if card is None:
            return
        for other in range(index - 1, -1, -1) if backwards else range(index + 1, len(card)):
            if get_current_worker().is_cancelled:
                return
            if wanted in card.paths[other].casefold() or any(
                wanted in line.casefold() for line in card.item(other).diff
            ):
                self.app.call_from_thread(self._found, other, backwards)
                return
        self.app.call_from_thread(self.notify, f"no more {text!a}", timeout=2, markup=False)

    def _found(self, index: int, backwards: bool) -> None:
        self._searching = backwards
        self.query_one(ChangeTree).go_to(index)
