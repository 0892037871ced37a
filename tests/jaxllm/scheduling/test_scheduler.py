"""Scheduler: vLLM's plans on hand-made scenarios, and the invariants I1-I6 under random workloads and policies."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.scheduling.policy import Budget, Policy, PriorityPolicy, Traits, make_policy
from jaxllm.scheduling.request import FinishReason, Request, State
from jaxllm.scheduling.scheduler import RequestTooLong, Scheduler, SchedulerConfig
from tests.jaxllm.scheduling.token_device import TokenDevice, expected_output


def config(**fields) -> SchedulerConfig:
    defaults = dict(num_pages=16, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
    return SchedulerConfig(**(defaults | fields))


def request(name, prompt, max_new_tokens=4, **fields) -> Request:
    prompt = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return Request(name, np.array(prompt, np.int32), max_new_tokens, **fields)


class Run:
    """Drives a scheduler against a TokenDevice, `ahead` steps before the results are read (0 or 1)."""

    def __init__(self, scheduler: Scheduler, ahead: int = 0, max_steps: int = 1) -> None:
        self.scheduler, self.device, self.ahead = scheduler, TokenDevice(scheduler.config), ahead
        self.max_steps = max_steps
        self.in_flight, self.now, self.plans = [], 0.0, []

    def step(self):
        plan = self.scheduler.schedule(self.now, self.max_steps)
        self.scheduler.check()
        self.plans.append(str(plan).split(": ")[1])
        if plan:
            self.in_flight.append((plan, self.device.execute(plan)))
        if self.in_flight and (not plan or len(self.in_flight) > self.ahead):
            self.scheduler.update(*self.in_flight.pop(0), self.now)
            self.scheduler.check()
        self.now += 1.0
        return plan

    def all(self, limit=5000):
        while self.scheduler.has_unfinished or self.in_flight:
            self.step()
            limit -= 1
            assert limit > 0, "no progress"


def run_all(scheduler, requests, ahead=0) -> Run:
    for one in requests:
        scheduler.add(one)
    run = Run(scheduler, ahead)
    run.all()
    return run


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_request(ahead):
    one = request("a", 5, 3)
    run = run_all(Scheduler(config()), [one], ahead)
    assert run.plans[:3] == ["a+5", "a+1", "a+1"]
    assert one.output_token_ids == expected_output(range(1, 6), 3)
    assert (one.finish_reason, one.stop_reason, one.state) == (FinishReason.LENGTH, None, State.FINISHED)


def test_long_prompt_is_computed_in_chunks_beside_decodes():
    a, b = request("a", 3, 6), request("b", 40, 2)
    run = run_all(Scheduler(config()), [a, b])
    assert run.plans[:4] == ["a+3, b+13", "a+1, b+15", "a+1, b+12", "a+1, b+1"]


def test_long_prefill_token_threshold():
    run = run_all(Scheduler(config(long_prefill_token_threshold=6)), [request("a", 14, 1), request("b", 3, 1)])
    assert run.plans[:3] == ["a+6, b+3", "a+6", "a+2"]


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_step():
    scheduler = Scheduler(config(enable_chunked_prefill=False, max_num_batched_tokens=64, num_pages=32))
    run = run_all(scheduler, [request("a", 40, 2), request("b", list(range(50, 90)), 1)])
    assert run.plans[:2] == ["a+40", "a+1, b+40"]


def test_max_num_seqs():
    run = run_all(Scheduler(config(max_num_seqs=2)), [request(name, 2, 2) for name in "abc"])
    assert run.plans[:3] == ["a+2, b+2", "a+1, b+1", "c+2"]


def test_fcfs_preempts_the_last_admitted_and_admits_nobody_in_that_step():
    scheduler = Scheduler(config(num_pages=4, enable_prefix_caching=False, max_model_len=16))
    a, b, c = request("a", 7, 6), request("b", 7, 6), request("c", 2, 1)
    run = run_all(scheduler, [a, b, c])
    # After two more tokens a needs a third page: b gives up both of its own, and c must not slip in.
    assert run.plans[:3] == ["a+7, b+7", "a+1, b+1", "a+1; preempted b"]
    assert (a.preemptions, b.preemptions) == (0, 1)
    for one in (a, b, c):
        assert one.output_token_ids == expected_output(one.prompt.tolist(), one.max_new_tokens)
    assert scheduler.num_recomputed_tokens == 8


def test_the_last_request_preempts_itself():
    scheduler = Scheduler(config(num_pages=4, enable_prefix_caching=False, max_model_len=16))
    run = run_all(scheduler, [request("a", 7, 2), request("b", 8, 6)])
    assert run.plans[:3] == ["a+7, b+8", "a+1; preempted b", "b+9"]


def test_priority_gives_back_the_budget_of_a_victim_already_planned():
    scheduler = Scheduler(config(num_pages=4, enable_prefix_caching=False, max_model_len=16), PriorityPolicy())
    low, high = request("low", 7, 6, priority=5), request("high", 8, 6, priority=1)
    scheduler.add(low)
    run = Run(scheduler)
    run.step()
    scheduler.add(high)
    run.step()
    run.step()
    assert run.plans == ["low+7", "low+1, high+8", "high+1; preempted low"]


def test_priority_orders_the_queue():
    scheduler = Scheduler(config(max_num_seqs=1), make_policy("priority"))
    requests = [request("c", 2, 1, priority=3), request("a", 2, 1, priority=1), request("b", 2, 1, priority=1)]
    assert run_all(scheduler, requests).plans == ["a+2", "b+2", "c+2"]


def test_prefix_hit_of_the_whole_prompt_recomputes_its_last_page():
    scheduler = Scheduler(config())
    run = run_all(scheduler, [request("a", 8, 1)])
    again = request("b", 8, 1)
    scheduler.add(again)
    run.all()
    assert run.plans == ["a+8", "b+4"] and again.num_cached_tokens == 4
    assert (scheduler.memory.queried_tokens, scheduler.memory.hit_tokens) == (16, 4)


def test_generated_tokens_are_cached_too():
    scheduler = Scheduler(config())
    first = request("a", 6, 7)
    run = run_all(scheduler, [first], ahead=1)
    longer = first.prompt.tolist() + first.output_token_ids + [1, 2]
    scheduler.add(request("b", longer, 1))
    run.all()
    assert (
        next(plan for plan in run.plans if "b" in plan) == "b+3"
    )  # 12 of its 15 tokens: 12 = three pages, all of them computed for a


def test_requests_admitted_to_one_step_share_the_prompt():
    scheduler = Scheduler(config())
    run = run_all(scheduler, [request("a", 9, 3), request("b", 9, 3)])
    assert run.plans[0] == "b+1, a+9"  # b finds the two pages that a fills in this very step


def test_a_prompt_of_one_token_has_a_time_of_admission_and_is_looked_up_once():
    scheduler = Scheduler(config())
    one = request("a", 1, 3)
    run_all(scheduler, [one])
    assert one.first_scheduled_at == 0.0 and scheduler.memory.queried_tokens == 1


def test_other_salt_no_hit():
    scheduler = Scheduler(config())
    run = run_all(scheduler, [request("a", 9, 1), request("b", 9, 1, cache_salt="x")], ahead=0)
    assert run.plans[0] == "a+9, b+7"


def test_equal_tokens_after_different_beginnings_are_not_confused():
    prompts = [[1, 1, 1, 1, 5, 5, 5, 5, 2], [2, 2, 2, 2, 5, 5, 5, 5, 2]]
    requests = [request(str(i), prompt, 4) for i, prompt in enumerate(prompts)]
    run_all(Scheduler(config()), requests)
    for one, prompt in zip(requests, prompts, strict=True):
        assert one.output_token_ids == expected_output(prompt, 4)


def test_several_decode_steps_in_a_row():
    a, b = request("a", 3, 20), request("b", 3, 9)
    scheduler = Scheduler(config())
    for one in (a, b):
        scheduler.add(one)
    run = Run(scheduler, max_steps=4)
    run.all()
    # Four steps each; then b has none left to take and a goes on alone, until its own limit.
    assert run.plans == ["a+3, b+3", "a+4, b+4", "a+4, b+4", "a+4", "a+4", "a+3"]
    assert a.output_token_ids == expected_output([1, 2, 3], 20) and b.output_token_ids == expected_output([1, 2, 3], 9)


def test_one_step_at_a_time_while_somebody_waits():
    scheduler = Scheduler(config(max_num_seqs=1))
    for name in "ab":
        scheduler.add(request(name, 3, 3))
    run = Run(scheduler, max_steps=4)
    run.all()
    assert run.plans == ["a+3", "a+1", "a+1", "b+3", "b+2"]


def test_stop_token_and_min_new_tokens():
    expected = expected_output(range(1, 6), 8)
    stop = frozenset([expected[2]])
    a = request("a", 5, 8, stop_token_ids=stop)
    b = request("b", 5, 8, stop_token_ids=stop, min_new_tokens=4)
    run_all(Scheduler(config()), [a, b], ahead=1)
    assert a.output_token_ids == expected_output(range(1, 6), 8, stop) and len(a.output_token_ids) <= 3
    assert (a.finish_reason, a.stop_reason) == (FinishReason.STOP, expected[2])
    assert b.output_token_ids == expected_output(range(1, 6), 8, stop, 4)


def test_abort_in_every_state():
    scheduler = Scheduler(config(max_num_seqs=1))
    running, waiting = request("a", 5, 50), request("b", 5, 5)
    for one in (running, waiting):
        scheduler.add(one)
    run = Run(scheduler, ahead=1)
    run.step()
    assert scheduler.abort("b") is waiting and scheduler.abort("a") is running  # a's token is in flight
    run.all()
    assert running.output_token_ids == [] and running.finish_reason is FinishReason.ABORT
    assert scheduler.abort("a") is None
    assert scheduler.memory.pool.num_free == 16


def test_max_model_len_ends_a_request():
    one = request("a", 10, 100)
    run_all(Scheduler(config(max_model_len=16)), [one], ahead=1)
    assert len(one.output_token_ids) == 6 and one.finish_reason is FinishReason.LENGTH


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(config(num_pages=4))
    with pytest.raises(RequestTooLong, match=r"prompt has 64 tokens; max_model_len is 64"):
        scheduler.add(request("a", 64))
    with pytest.raises(RequestTooLong, match=r"needs 6 KV pages .*the pool has 4"):
        scheduler.add(request("a", 20, 4))
    with pytest.raises(RequestTooLong, match="empty"):
        scheduler.add(request("a", []))
    scheduler.add(request("a", 4))
    with pytest.raises(ValueError, match="already in use"):
        scheduler.add(request("a", 4))
    assert list(scheduler.requests) == ["a"]


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_pages=0),
        dict(max_num_seqs=0),
        dict(enable_chunked_prefill=False, max_num_batched_tokens=16),
        dict(enable_chunked_prefill=False, max_num_batched_tokens=64, long_prefill_token_threshold=8),
    ],
)
def test_bad_config(fields):
    with pytest.raises(ValueError, match=next(reversed(fields))):
        config(**fields)


def test_unknown_policy():
    with pytest.raises(ValueError, match=r"fcfs.*priority.*'lifo'"):
        make_policy("lifo")


class Raising(Policy):
    traits = Traits(order="all")

    def order(self, view):
        yield from view.resident
        raise RuntimeError("a bug in the policy")


class Lazy(Policy):
    """Plans nothing at all."""

    traits = Traits(order="all")

    def order(self, view):
        return ()


def test_a_raising_policy_loses_nothing(caplog):
    requests = [request(name, 5, 5) for name in "abc"]
    scheduler = Scheduler(config(), Raising())
    run_all(scheduler, requests)
    assert scheduler.num_policy_errors > 0 and "a bug in the policy" in caplog.text
    assert all(one.finish_reason is FinishReason.LENGTH for one in requests)


def test_a_policy_that_plans_nothing_is_overruled():
    scheduler = Scheduler(config(), Lazy())
    run_all(scheduler, [request(name, 5, 5) for name in "abc"])
    assert scheduler.num_policy_stalls > 0


def test_a_policy_hears_of_everything():
    heard = []

    class Listener(Policy):
        def on_arrival(self, request, view):
            heard.append(("arrival", request.id, len(view.waiting)))

        def on_step(self, report, view):
            heard.append(("step", [(r.id, prompt, new) for r, prompt, new in report.items]))

        def on_finish(self, request, view):
            heard.append(("finish", request.id))

    run_all(Scheduler(config(), Listener()), [request("a", 20, 2)])
    assert heard == [
        ("arrival", "a", 1),
        ("step", [("a", 16, 0)]),
        ("step", [("a", 4, 1)]),
        ("finish", "a"),
        ("step", [("a", 0, 1)]),
    ]


class RandomPolicy(Policy):
    """Answers at random, and not always sensibly: leaves out, repeats, invents, and preempts whom it likes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        order = self.random.choice(["waiting", "all"])
        self.traits = Traits(
            order,
            self.random.choice(["stop", "skip"]),
            preempt_to_admit=order == "all" and self.random.random() < 0.5,
            admit_after_preempt=self.random.random() < 0.5,
        )
        self.stranger = request("stranger", 3)

    def _shuffled(self, requests):
        chosen = [one for one in requests if self.random.random() < 0.9] + [self.stranger]
        chosen += chosen[:1]
        self.random.shuffle(chosen)
        return chosen

    def key(self, request):
        return self.random.random()

    def order(self, view):
        if self.random.random() < 0.02:
            raise RuntimeError("now and then")
        everybody = [*view.waiting, *view.resident] if self.traits.order == "all" else view.waiting
        return self._shuffled(everybody)

    def budget(self, view):
        return Budget(
            self.random.randint(-1, 40), self.random.choice([None, 0, 3, 8]), self.random.choice([None, 1, 5])
        )

    def reserve(self, request, view):
        return self.random.choice([0, 0, 0, 3, 100])

    def victims(self, needed, view):
        return self._shuffled(view.resident)


WORKLOAD = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt length
        st.integers(1, 20),  # new tokens
        st.integers(0, 2),  # which of three texts the prompt is the beginning of
        st.integers(0, 15),  # the step at which it arrives
        st.integers(0, 3),  # priority
        st.one_of(st.none(), st.integers(1, 20)),  # steps after arrival at which it is aborted
    ),
    min_size=1,
    max_size=12,
)
TEXTS = [[(i * k) % 7 + 1 for i in range(60)] for k in (1, 2, 3)]


@settings(max_examples=150, deadline=None)
@given(
    workload=WORKLOAD,
    policy=st.one_of(st.sampled_from(["fcfs", "priority"]), st.integers(0, 10**6)),
    num_pages=st.integers(13, 30),
    page_size=st.sampled_from([1, 4, 5]),
    max_num_seqs=st.integers(1, 6),
    max_tokens=st.integers(1, 40),
    caching=st.booleans(),
    ahead=st.integers(0, 1),
    max_steps=st.sampled_from([1, 1, 2, 7]),
    stops=st.frozensets(st.integers(0, 10), max_size=2),
)
def test_invariants(workload, policy, num_pages, page_size, max_num_seqs, max_tokens, caching, ahead, max_steps, stops):
    policy = RandomPolicy(policy) if isinstance(policy, int) else make_policy(policy)
    scheduler = Scheduler(
        config(
            num_pages=num_pages * 4 // page_size,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_model_len=50,
            enable_prefix_caching=caching,
        ),
        policy,
    )
    run, arrivals, aborts, requests = Run(scheduler, ahead, max_steps), {}, {}, []
    for i, (length, new, text, arrives, priority, aborted) in enumerate(workload):
        one = request(f"r{i}", TEXTS[text][:length], new, priority=priority, stop_token_ids=stops, min_new_tokens=i % 3)
        arrivals.setdefault(arrives, []).append(one)
        if aborted is not None:
            aborts.setdefault(arrives + aborted, []).append(f"r{i}")
    steps = 0
    while arrivals or scheduler.has_unfinished or run.in_flight:
        for one in arrivals.pop(steps, []):
            scheduler.add(one, float(steps))
            requests.append(one)
        for name in aborts.pop(steps, []):
            scheduler.abort(name, float(steps))
        run.step()
        steps += 1
        assert steps < 5000, "no progress (I5, I6)"
    for one in requests:
        expected = expected_output(one.prompt.tolist(), one.max_new_tokens, stops, one.min_new_tokens)
        if one.finish_reason is FinishReason.ABORT:
            assert one.output_token_ids == expected[: len(one.output_token_ids)]
        else:
            assert one.output_token_ids == expected  # I1, and that neither batch nor policy changes an output (I11)
    assert scheduler.memory.pool.num_free == scheduler.config.num_pages


@settings(max_examples=60, deadline=None)
@given(workload=WORKLOAD, max_tokens=st.integers(1, 40), threshold=st.sampled_from([0, 5]), ahead=st.integers(0, 1))
def test_all_residents_at_once_plans_what_one_by_one_plans(workload, max_tokens, threshold, ahead):
    class OneByOne(Scheduler):
        def _run_all_at_once(self, draft):
            return False

    def plans(kind):
        fields = dict(num_pages=20, max_num_batched_tokens=max_tokens, long_prefill_token_threshold=threshold)
        scheduler = kind(config(**fields))
        for i, (length, new, text, *_) in enumerate(workload):
            scheduler.add(request(f"r{i}", TEXTS[text][:length], new))
        run = Run(scheduler, ahead)
        run.all()
        return run.plans

    assert plans(Scheduler) == plans(OneByOne)
