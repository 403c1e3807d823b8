"""The balancer's decisions: no clock, no I/O; time is a number here."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from luminaguard.mcp.balancing import (
    Balancer,
    Budget,
    Call,
    Chosen,
    Fate,
    Health,
    Nobody,
    Tuning,
    Verdict,
    Waits,
    verdict,
)


def balancer(count=3, *, strategy="two-choices", weights=None, seed=1, **tuning):
    made = Balancer(random.Random(seed), Tuning(**tuning), strategy=strategy)
    made.set_endpoints(weights or {f"e{n}": 1.0 for n in range(count)}, 0.0)
    return made


def served(made):
    return [one.served for one in made.endpoints.values()]


def play(made, requests, *, latency=lambda _: 0.01, at=0.0, every=0.01):
    """One request after another, each answered before the next."""
    now = at
    for _ in range(requests):
        chosen = made.choose(now)
        assert isinstance(chosen, Chosen)
        attempt = made.begin(chosen.name, now)
        made.succeeded(attempt, now + latency(chosen.name))
        now += every
    return now


@pytest.mark.parametrize("strategy", ["two-choices", "round-robin"])
def test_equal_endpoints_get_equal_shares(strategy):
    made = balancer(strategy=strategy)
    noise = random.Random(3)
    play(made, 3000, latency=lambda _: 0.01 * (0.8 + 0.4 * noise.random()))
    assert max(served(made)) - min(served(made)) <= 300  # within a tenth of even


def test_shares_follow_weights():
    made = balancer(strategy="round-robin", weights={"a": 3.0, "b": 1.0})
    play(made, 400)
    assert served(made) == [300, 100]


def test_the_less_loaded_of_two_gets_it():
    made = balancer(2)
    first = made.begin("e0", 0.0)
    assert made.choose(0.0) == Chosen("e1")
    made.begin("e1", 0.0)
    made.begin("e1", 0.0)
    assert made.choose(0.1) == Chosen("e0")
    made.succeeded(first, 0.2)


def test_one_that_is_much_slower_gets_less():
    made = balancer(3)
    play(made, 600, latency=lambda name: 0.2 if name == "e1" else 0.01)
    counts = served(made)
    assert counts[1] < min(counts[0], counts[2]) / 4


def test_failures_take_an_endpoint_out_and_one_good_trial_brings_it_back_slowly():
    made = balancer(2, failures=3, out_s=10.0)
    for _ in range(3):
        made.failed(made.begin("e0", 0.0), 0.0)
    e0 = made.endpoints["e0"]
    assert e0.health(0.1) is Health.OUT
    assert {made.choose(1.0).name for _ in range(20)} == {"e1"}
    assert e0.health(12.1) is Health.TRIAL
    assert made.choose(12.1, trial=False) == Chosen("e1")  # nothing that must not be lost is tried on it
    assert made.choose(12.1, trial=True) == Chosen("e0")
    attempt = made.begin("e0", 12.1)
    assert made.choose(12.1, trial=True) == Chosen("e1")  # one at a time
    made.succeeded(attempt, 12.2)
    assert e0.health(12.2) is Health.WELL
    assert e0.share(12.2, made.tuning) == pytest.approx(0.1)
    assert e0.share(30.0, made.tuning) == 1.0


def test_each_time_it_is_out_for_longer():
    made = balancer(1, failures=1, out_s=1.0, longest_out_s=8.0)
    now, lasted = 0.0, []
    for _ in range(6):
        made.failed(made.begin("e0", now), now)
        opens = made.endpoints["e0"].opens_at(now)
        lasted.append(opens - now)
        now = opens
    assert all(0.8 * want <= got <= 1.2 * want for want, got in zip([1, 2, 4, 8, 8, 8], lasted, strict=True))


def test_what_began_before_it_went_out_says_nothing_about_its_return():
    made = balancer(1, failures=1, out_s=1.0)
    old = [made.begin("e0", 0.0) for _ in range(3)]
    made.failed(old[0], 0.1)
    made.failed(old[1], 0.2)  # does not take it out for longer
    assert made.endpoints["e0"].opens_at(0.3) <= 1.4
    made.succeeded(old[2], 2.0)
    assert made.endpoints["e0"].health(2.0) is Health.TRIAL


def test_one_that_fails_much_more_often_than_the_others_is_taken_out():
    made = balancer(3, window=10, failures=100)
    for turn in range(10):
        for name in ("e1", "e2"):
            made.succeeded(made.begin(name, 0.0), 0.1)
        attempt = made.begin("e0", 0.0)
        if turn % 3:
            made.failed(attempt, 0.1)
        else:
            made.succeeded(attempt, 0.1)
    made.failed(made.begin("e0", 0.0), 0.2)
    assert made.endpoints["e0"].health(0.2) is Health.OUT


def test_where_all_fail_alike_none_is_an_outlier():
    made = balancer(3, window=10, failures=100)
    for turn in range(30):
        for name in ("e0", "e1", "e2"):
            attempt = made.begin(name, 0.0)
            (made.failed if turn % 2 else made.succeeded)(attempt, 0.1)
    assert {one.health(0.2) for one in made.endpoints.values()} == {Health.WELL}


def test_a_pause_that_was_asked_for_is_kept_and_is_no_failure():
    made = balancer(2, longest_wait_s=30.0)
    made.busy(made.begin("e0", 0.0), 0.0, 5.0)
    assert {made.choose(4.9).name for _ in range(20)} == {"e1"}
    made.busy(made.begin("e1", 0.0), 0.0, 99999.0)
    assert made.choose(1.0) == Waits(5.0, "all ask for a longer pause")
    assert made.choose(5.0) == Chosen("e0")
    assert made.endpoints["e1"].opens_at(5.0) == 30.0
    assert made.endpoints["e0"].failure_rate == 0.0


def test_out_endpoints_are_waited_for_only_so_long():
    made = balancer(1, failures=1, out_s=60.0, patience_s=5.0)
    made.failed(made.begin("e0", 0.0), 0.0)
    assert isinstance(made.choose(1.0, waited_s=1.0), Waits)
    assert made.choose(6.0, waited_s=5.0) == Nobody("no endpoint answers")
    assert balancer(0).choose(0.0) == Nobody("there is no endpoint")


def test_one_whose_tools_differ_gets_nothing_and_says_why():
    made = balancer(2)
    made.checked("e0", 0.0, well=True, different="its tools are not the same: add")
    assert {made.choose(0.0).name for _ in range(20)} == {"e1"}
    made.set_endpoints({"e0": 1.0}, 1.0)
    assert made.choose(1.0) == Nobody("e0 differs: its tools are not the same: add")
    made.checked("e0", 2.0, well=True)
    assert made.choose(2.0) == Chosen("e0")


def test_a_removed_endpoint_ends_what_it_has_and_gets_nothing_new():
    made = balancer(2)
    attempt = made.begin("e0", 0.0)
    made.set_endpoints({"e1": 1.0}, 1.0)
    assert {made.choose(1.0).name for _ in range(20)} == {"e1"}
    assert made.endpoints["e0"].health(1.0) is Health.LEAVING
    made.succeeded(attempt, 2.0)
    assert list(made.endpoints) == ["e1"]


def test_a_new_endpoint_beside_others_starts_slowly():
    made = balancer(2)
    play(made, 10)
    made.set_endpoints({"e0": 1.0, "e1": 1.0, "new": 1.0}, 100.0)
    assert made.endpoints["new"].share(100.0, made.tuning) == pytest.approx(0.1)
    assert made.endpoints["e0"].share(100.0, made.tuning) == 1.0


def test_one_that_is_tried_and_busy_does_not_eat_all_attempts():
    made = balancer(2, failures=1, out_s=1.0)
    made.failed(made.begin("e0", 0.0), 0.0)
    made.busy(made.begin("e0", 2.0), 2.0, 3.0)
    assert made.choose(2.1, tried=["e0"], trial=True) == Chosen("e1")
    assert made.choose(4.9, trial=True) == Chosen("e1")  # its pause is kept
    assert made.choose(5.1, trial=True) == Chosen("e0")


def test_one_that_is_always_busy_gets_less_and_less():
    made = balancer(2)
    asked, now = {"e0": 0, "e1": 0}, 0.0
    for _ in range(1000):
        name = made.choose(now).name
        asked[name] += 1
        attempt = made.begin(name, now)
        if name == "e0":
            made.busy(attempt, now)
        else:
            made.succeeded(attempt, now + 0.001)
        now += 0.01
    assert asked["e0"] < 30


def test_one_slow_answer_is_forgotten_after_a_while():
    made = balancer(2)
    play(made, 20)
    made.succeeded(made.begin("e0", 1.0), 31.0)  # 30 s, once
    play(made, 400, at=31.0, every=0.5)
    assert min(served(made)) > 100


def test_the_lighter_one_gets_its_share_of_single_calls():
    made = balancer(weights={"a": 10.0, "b": 1.0})
    play(made, 2200)
    assert 120 < served(made)[1] < 300


def test_a_trial_that_hangs_blocks_nobody_for_ever():
    made = balancer(1, failures=1, out_s=1.0, patience_s=5.0)
    made.failed(made.begin("e0", 0.0), 0.0)
    hangs = made.begin("e0", 2.0)
    waits = made.choose(2.0, waited_s=1.0)
    assert isinstance(waits, Waits) and waits.until == 6.0
    assert isinstance(made.choose(6.0, waited_s=5.0), Nobody)
    made.checked("e0", 7.0, well=True)
    made.failed(made.begin("e0", 7.0), 7.0)
    assert made.choose(10.0) == Chosen("e0")  # another trial, though the first one still hangs
    made.gave_up(hangs)


def test_calls_of_a_session_that_has_no_other_place_do_not_lengthen_its_absence():
    made = balancer(1, failures=1, out_s=1.0)
    made.failed(made.begin("e0", 0.0), 0.0)
    for attempt in [made.begin("e0", 2.0) for _ in range(6)]:
        made.failed(attempt, 2.0)
    assert made.endpoints["e0"].opens_at(2.0) <= 2.0 + 2 * 1.2


def test_the_budget_is_a_share_of_what_is_asked():
    budget = Budget(0.2, 2.0)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
    assert (budget.spent, budget.refused) == (3, 2)
    for _ in range(1000):
        budget.earn()
    assert budget.left == 2.0


def test_what_is_slow_is_known_after_a_few():
    made = balancer(1)
    assert made.slow_after() == math.inf
    play(made, 100)
    assert made.slow_after() == pytest.approx(0.01)


WRITES, READS = Call("tools/call", "add"), Call("tools/call", "look", harmless=True, read_only=True)


@pytest.mark.parametrize(("call", "fate", "left", "said"), [
    (WRITES, Fate.ANSWERED, 1, Verdict.DELIVER),
    (WRITES, Fate.NOT_SENT, 1, Verdict.AGAIN), (WRITES, Fate.NOT_SENT, 0, Verdict.NOT_EXECUTED),
    (WRITES, Fate.BUSY, 1, Verdict.AGAIN), (WRITES, Fate.BUSY, 0, Verdict.NOT_EXECUTED),
    (WRITES, Fate.LOST, 5, Verdict.MAYBE_EXECUTED), (WRITES, Fate.BROKEN, 5, Verdict.MAYBE_EXECUTED),
    (READS, Fate.LOST, 1, Verdict.AGAIN), (READS, Fate.LOST, 0, Verdict.NOT_EXECUTED),
    (WRITES, Fate.REFUSED, 5, Verdict.NOT_EXECUTED), (READS, Fate.REFUSED, 5, Verdict.NOT_EXECUTED),
    (READS, Fate.BROKEN, 5, Verdict.NOT_EXECUTED),
    (Call("tools/list"), Fate.LOST, 1, Verdict.AGAIN), (Call("resources/subscribe"), Fate.LOST, 1,
                                                        Verdict.MAYBE_EXECUTED),
    (Call("notifications/x", is_request=False), Fate.LOST, 1, Verdict.AGAIN),
])  # fmt: skip
def test_what_is_done_after_an_attempt(call, fate, left, said):
    assert verdict(call, fate, attempts_left=left) is said


def test_a_server_that_is_not_believed_when_it_says_that_it_did_nothing():
    assert verdict(WRITES, Fate.BUSY, attempts_left=3, busy_is_not_done=False) is Verdict.MAYBE_EXECUTED
    assert verdict(READS, Fate.BUSY, attempts_left=3, busy_is_not_done=False) is Verdict.AGAIN


@given(st.sampled_from(list(Fate)), st.integers(0, 9), st.booleans())
def test_what_may_not_be_done_twice_is_never_sent_again_after_it_was_sent(fate, left, believed):
    sent = fate in {Fate.LOST, Fate.BROKEN} or (fate is Fate.BUSY and not believed)
    what = verdict(WRITES, fate, attempts_left=left, busy_is_not_done=believed)
    assert (what is Verdict.MAYBE_EXECUTED) == sent


class Endpoints(RuleBasedStateMachine):
    """Whatever happens in whatever order, numbers stay right and whoever is well is chosen."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.made = balancer(3, failures=2, window=5)
        self.open = []

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(trial=st.booleans())
    def ask(self, trial):
        chosen = self.made.choose(self.now, trial=trial)
        if isinstance(chosen, Chosen):
            one = self.made.endpoints[chosen.name]
            assert one.takes(self.now)
            self.open.append(self.made.begin(chosen.name, self.now))
        elif isinstance(chosen, Waits):
            assert chosen.until > self.now
        assert isinstance(chosen, Chosen) or not any(one.takes(self.now) for one in self.made.endpoints.values())

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "busy", "gave_up"]), pause=st.floats(0, 9))
    def end(self, data, how, pause):
        attempt = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        match how:
            case "succeeded":
                self.made.succeeded(attempt, self.now)
            case "failed":
                self.made.failed(attempt, self.now)
            case "busy":
                self.made.busy(attempt, self.now, pause)
            case _:
                self.made.gave_up(attempt)

    @rule(names=st.sets(st.sampled_from(["e0", "e1", "e2", "e3"])))
    def endpoints_change(self, names):
        self.made.set_endpoints(dict.fromkeys(names, 1.0), self.now)

    @rule(name=st.sampled_from(["e0", "e1"]), well=st.booleans(), different=st.sampled_from(["", "x"]))
    def check(self, name, well, different):
        self.made.checked(name, self.now, well=well, different=different)

    @invariant()
    def numbers_are_right(self):
        for name, one in self.made.endpoints.items():
            assert one.running == sum(attempt.endpoint is one for attempt in self.open)
            on_trial = [attempt for attempt in self.open if one._trying is attempt]
            assert len(on_trial) <= 1 and all(attempt.trial for attempt in on_trial)
            assert one._trying is None or on_trial  # what is tried is under way
            assert one.name == name
            assert 0 < one.share(self.now, self.made.tuning) <= one.weight
        assert len(self.made.table(self.now)) == len(self.made.endpoints)


TestEndpoints = Endpoints.TestCase
