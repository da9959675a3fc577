"""What the talker says on the way: fixed questions in, text and sound in the run folder and trackers out.

Knows nothing of data or losses; draws no number from the generators of the run.
"""

import logging
from pathlib import Path
from typing import Any

from omni_adapter.audio.waveform import write_wav
from omni_adapter.errors import ConfigError, OmniError
from omni_adapter.generation.streaming import Reply
from omni_adapter.talker import OmniAdapter
from omni_adapter.training.checkpoint import random_state, set_random_state
from omni_adapter.training.loop import Trainer
from omni_adapter.training.report import ANSWER_FOLDER
from omni_adapter.training.settings import PromptSettings
from omni_adapter.training.watch import Silent, Trackers

logger = logging.getLogger(__name__)


class Answers(Silent):
    """Lets the talker answer fixed questions now and then, on the first process.

    Args:
        talker: shares its weights with the trainer's model.
        trainer: the run.
        trackers: told of each answer, if there are any.
    """

    def __init__(self, talker: OmniAdapter, trainer: Trainer, *, trackers: Trackers | None) -> None:
        self._talker = talker
        self._trainer = trainer
        self._trackers = trackers
        if trainer.engine.meets_in_layers:
            logger.warning("no answers on the way: each process holds only a part of the weights")

    def on_step(self, step: int) -> None:
        """Answer if it is time; draws no number from the generators of the run."""
        trainer, watch = self._trainer, self._trainer.settings.watch
        if step % watch.answer_every or trainer.engine.meets_in_layers or trainer.ranks.rank:
            return
        device = trainer.accelerator.device
        values, generators = random_state(device)
        model = trainer.engine.model
        model.eval()
        self._talker.to(device)
        try:
            for number, prompt in enumerate(watch.prompts):
                self._answer(prompt, f"prompt-{number}", step)
        finally:
            model.train()
            set_random_state(values, generators, device)

    def _answer(self, prompt: PromptSettings, name: str, step: int) -> None:
        folder = Path(self._trainer.settings.out) / ANSWER_FOLDER / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            reply = ask(self._talker, prompt, max_new_tokens=self._trainer.settings.watch.max_new_tokens)
        except OmniError as error:
            logger.warning("no answer to %s: %s", prompt, error)
            return
        (folder / f"{name}.txt").write_text(reply.text, encoding="utf-8")
        if len(reply.audio):
            write_wav(folder / f"{name}.wav", reply.audio, sampling_rate=reply.sampling_rate)
        if self._trackers is not None:
            self._trackers.on_answer(name, reply.text, reply.audio, reply.sampling_rate, step)


def ask(talker: OmniAdapter, prompt: PromptSettings, *, max_new_tokens: int) -> Reply:
    """Return a talker's reply to a question of the settings."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if prompt.task == "asr":
        if prompt.audio is None:
            raise ConfigError("a prompt with the task asr needs audio")
        return talker.transcribe(prompt.audio, **options)
    if prompt.task == "tts":
        return talker.say(prompt.text or "", **options)
    return talker.chat(prompt.audio, text=prompt.text, **options)
