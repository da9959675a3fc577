"""Who gets the machine next: somebody who still waits for the first sound, or those who are being heard.

Times in, a turn out. Pure arithmetic on seconds; knows nothing of models, threads or clocks.

A listener never notices how fast sound is made as long as some of it is in hand. So the time that those who
are being heard are ahead of their listeners is given to newcomers, whose every moment of waiting is noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from omni_adapter.errors import ConfigError

Turn = Literal["start", "admit", "step", "wait"]
"""``start``: a step of the newcomer who came first, alone. ``admit``: read the next prompt that waits.
``step``: a step of all. ``wait``: there is nothing to do."""

_NEW_SHARE = 0.3  # of the latest cost in what a turn is expected to cost


@dataclass
class Playback:
    """What a listener has been handed.

    Attributes:
        begun_s: when the first sound was handed over; None before.
        audio_s: sound handed over so far, seconds.
    """

    begun_s: float | None = None
    audio_s: float = 0.0

    def hand_over(self, audio_s: float, *, now_s: float) -> None:
        """Count ``audio_s`` seconds of sound."""
        if audio_s and self.begun_s is None:
            self.begun_s = now_s
        self.audio_s += audio_s

    def lead_s(self, now_s: float) -> float | None:
        """Seconds of sound that were not heard yet, below zero after a gap; None before the first sound."""
        return None if self.begun_s is None else self.audio_s - (now_s - self.begun_s)


@dataclass
class Schedule:
    """Chooses turns.

    Attributes:
        lead_s: seconds of sound that each listener keeps in hand while newcomers are served; None gives
            newcomers no turns of their own: all go on in step, which costs least in all.
        patience_s: seconds after which a prompt that waits is read even though a listener may notice.
        costs_s: seconds that a turn of each kind is expected to take, learned from those that were taken.
    """

    lead_s: float | None = 0.5
    patience_s: float = 2.0
    costs_s: dict[Turn, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("lead_s", self.lead_s), ("patience_s", self.patience_s)):
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0 seconds, got {value}")

    def choose(
        self,
        *,
        now_s: float,
        waiting_since_s: float | None,
        num_starting: int,
        leads_s: Sequence[float],
        num_running: int,
    ) -> Turn:
        """Return what to do next.

        Args:
            now_s: the time.
            waiting_since_s: when the prompt that waits longest came; None if none waits or no place is free.
            num_starting: newcomers whose prompt was read and who have no sound yet.
            leads_s: seconds of sound in hand of each conversation that is being heard.
            num_running: all conversations whose prompt was read.
        """
        if self.lead_s is None:
            return "admit" if waiting_since_s is not None else "step" if num_running else "wait"
        spare_s = min(leads_s, default=float("inf")) - self.lead_s
        if num_starting and spare_s >= self.costs_s.get("start", 0.0):
            return "start"
        if waiting_since_s is not None and (
            spare_s >= self.costs_s.get("admit", 0.0) or now_s - waiting_since_s >= self.patience_s
        ):
            return "admit"
        return "step" if num_running else "wait"

    def took(self, turn: Turn, seconds: float) -> None:
        """Learn what a turn cost."""
        known = self.costs_s.get(turn, seconds)
        self.costs_s[turn] = known + _NEW_SHARE * (seconds - known)
