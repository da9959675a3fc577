"""The schedule alone, with a clock that only the test moves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.errors import ConfigError
from omni_adapter.generation.schedule import Playback, Schedule

COSTS = {"admit": 0.3, "start": 0.02, "step": 0.05}
FRAME_S = 0.085  # sound that a step brings
STEPS_TO_SOUND = 10


class World:
    """Conversations under a schedule: what each turn costs is known, and time passes by turns alone."""

    def __init__(self, schedule: Schedule, *, places: int = 8, frames: int = 80, costs=COSTS) -> None:
        self.schedule, self.places, self.frames, self.costs = schedule, places, frames, costs
        self.now_s = 0.0
        self.waiting: list[tuple[float, int]] = []
        self.steps: dict[int, int] = {}
        self.starting: list[int] = []
        self.playbacks: dict[int, Playback] = {}
        self.arrived: dict[int, float] = {}
        self.first_sound_s: dict[int, float] = {}
        self.smallest_lead_s = float("inf")

    def submit(self, name: int) -> None:
        self.waiting.append((self.now_s, name))
        self.arrived[name] = self.now_s

    def leads(self) -> list[float]:
        leads = [playback.lead_s(self.now_s) for playback in self.playbacks.values()]
        return [lead for lead in leads if lead is not None]

    def turn(self) -> str:
        free = len(self.steps) < self.places
        turn = self.schedule.choose(
            now_s=self.now_s,
            waiting_since_s=self.waiting[0][0] if self.waiting and free else None,
            num_starting=len(self.starting),
            leads_s=self.leads(),
            num_running=len(self.steps),
        )
        if turn == "wait":
            return turn
        self.now_s += self.costs[turn]
        self.smallest_lead_s = min([self.smallest_lead_s, *self.leads()])
        if turn == "admit":
            _, name = self.waiting.pop(0)
            self.steps[name], self.playbacks[name] = 0, Playback()
            self.starting.append(name)
        elif turn == "start":
            self.step(self.starting[0])
        else:
            self.starting.clear()
            for name in list(self.steps):
                self.step(name)
        self.schedule.took(turn, self.costs[turn])
        return turn

    def step(self, name: int) -> None:
        self.steps[name] += 1
        if self.steps[name] >= STEPS_TO_SOUND:
            self.playbacks[name].hand_over(FRAME_S, now_s=self.now_s)
            self.first_sound_s.setdefault(name, self.now_s - self.arrived[name])
            if name in self.starting:
                self.starting.remove(name)
        if self.steps[name] >= self.frames + STEPS_TO_SOUND:
            del self.steps[name], self.playbacks[name]


def test_nothing_to_do():
    world = World(Schedule())
    assert world.turn() == "wait"


def test_one_alone_is_read_started_and_carried_on():
    world = World(Schedule())
    world.submit(0)
    turns = [world.turn() for _ in range(14)]
    assert turns == ["admit", *["start"] * STEPS_TO_SOUND, *["step"] * 3]
    assert world.first_sound_s[0] == pytest.approx(0.3 + 10 * 0.02)


def test_newcomers_live_on_what_others_have_in_hand():
    world = World(Schedule(lead_s=0.5))
    world.submit(0)
    while not world.leads() or min(world.leads()) < 1.2:
        world.turn()
    world.submit(1)
    turns = []
    while 1 not in world.first_sound_s:
        turns.append(world.turn())
    assert turns == ["admit", *["start"] * STEPS_TO_SOUND]
    assert world.smallest_lead_s >= 0  # of the first sound's frame; from then on 0.5 s are kept
    assert min(world.leads()) >= 0.0


def test_whoever_is_heard_comes_first_while_little_is_in_hand():
    world = World(Schedule(lead_s=0.5, patience_s=60))
    world.submit(0)
    while 0 not in world.first_sound_s:
        world.turn()
    world.submit(1)
    turns = []
    while 1 not in world.steps:
        assert "admit" not in turns
        turns.append(world.turn())
    assert set(turns[:-1]) == {"step"}
    # 0.5 s to keep and 0.3 s to read the prompt, at 35 ms a step
    assert len(turns) == pytest.approx((0.5 + 0.3 - FRAME_S) / (FRAME_S - 0.05), abs=2)


def test_patience_ends():
    slow = {**COSTS, "step": 0.1}  # nobody ever gets ahead
    world = World(Schedule(patience_s=1.0), costs=slow)
    world.submit(0)
    while 0 not in world.first_sound_s:
        world.turn()
    world.submit(1)
    while 1 not in world.steps:
        world.turn()
    assert world.now_s - world.arrived[1] == pytest.approx(1.0 + 0.3, abs=0.1)


def test_without_a_lead_all_are_read_and_go_on_in_step():
    world = World(Schedule(lead_s=None))
    for name in range(3):
        world.submit(name)
    assert [world.turn() for _ in range(5)] == ["admit", "admit", "admit", "step", "step"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 6), min_size=1, max_size=12), st.floats(0.2, 1.0), st.floats(0.01, 0.06))
def test_a_machine_that_keeps_up_lets_nobody_underrun_who_has_a_lead(arrivals, lead_s, step_s):
    """Once somebody has the lead, newcomers never take it away, and everybody is heard."""
    world = World(
        Schedule(lead_s=lead_s, patience_s=1e9), places=12, costs={**COSTS, "start": step_s, "step": step_s}
    )
    arrivals = sorted(arrivals)
    had_lead: set[int] = set()
    name = 0
    while name < len(arrivals) or world.steps or world.waiting:
        while name < len(arrivals) and (arrivals[name] <= world.now_s or not (world.steps or world.waiting)):
            world.now_s = max(world.now_s, arrivals[name])
            world.submit(name)
            name += 1
        world.turn()
        for running, playback in world.playbacks.items():
            lead = playback.lead_s(world.now_s)
            if lead is not None and lead >= lead_s + 0.3:
                had_lead.add(running)
            if running in had_lead:
                assert lead >= lead_s - 1e-6 - step_s
    assert len(world.first_sound_s) == len(arrivals)


def test_costs_are_learned():
    schedule = Schedule()
    schedule.took("step", 1.0)
    assert schedule.costs_s == {"step": 1.0}
    schedule.took("step", 2.0)
    assert schedule.costs_s["step"] == pytest.approx(1.3)


@pytest.mark.parametrize("name", ["lead_s", "patience_s"])
def test_times_below_zero_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 0 seconds, got -1"):
        Schedule(**{name: -1})
