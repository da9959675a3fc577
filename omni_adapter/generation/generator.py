"""The decoding loop: a batch of prompts in, one step of text and codes after the other out.

Batch [B, K + 1, S] -> Step(text [n], codes [n, K]). Tasks differ in their prompts and settings, not in code.
Knows nothing of tokenizers, waveforms or codecs.
"""

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omni_adapter.data.collator import Batch, Sample, collate
from omni_adapter.data.layout import GridRules, Task
from omni_adapter.errors import ConfigError, ContextOverflowError, PromptError
from omni_adapter.generation.sampling import (
    CODE_ROWS,
    CodeAutomaton,
    CodeRows,
    SamplingSettings,
    penalise,
    sample,
)
from omni_adapter.model import OmniCache, OmniModel

logger = logging.getLogger(__name__)

FinishReason = Literal["end", "length", "context"]
Role = Literal["speech", "text", "joint"]


@dataclass(frozen=True)
class GenerationSettings:
    """How a reply is decoded.

    Attributes:
        max_new_tokens: steps at most; one step is one text token and one frame of codes.
        text_sampling: how text is drawn.
        code_sampling: how codes are drawn.
        seed: start of every conversation's draws and of the codec's noise.
        batch_parallel: let a second row without codes write the text (paper, section 3.3); for tasks that
            speak.
        stride: frames per chunk of sound; the first chunk comes as soon as any sound is final.
    """

    max_new_tokens: int = 1024
    text_sampling: SamplingSettings = field(default_factory=SamplingSettings)
    code_sampling: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    batch_parallel: bool = True
    stride: int = 4

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.stride < 1:
            raise ConfigError(f"stride must be at least 1 frame, got {self.stride}")


class Step(NamedTuple):
    """What one step of the loop brought, for the conversations still running.

    Attributes:
        conversations: their indices in the batch, length n.
        text: text ids, [n]; the rules' ``no_text`` after the end of a text.
        codes: delayed ids of the code rows, [n, K]; pad where a row has none.
        finished: why a conversation ended with this step, or None if it goes on; length n.
    """

    conversations: tuple[int, ...]
    text: Tensor
    codes: Tensor
    finished: tuple[FinishReason | None, ...]


class Row(NamedTuple):
    """One row of the LM's batch: whose it is, and what is read off it."""

    conversation: int
    role: Role


@dataclass
class DecodingState:
    """Everything a decode remembers between steps. Dropping it frees all of it.

    Attributes:
        rows: rows of the LM's batch, in the order of the cache; those that speak come first.
        cache: state of LM and TTS blocks.
        attention_mask: [rows, steps so far], None if no prompt was padded.
        positions: position of the next step, [n].
        step: answer steps done.
        max_steps: answer steps at most, [n].
        context_limited: whether ``max_steps`` comes from the base's positions, [n].
        text: last text id, [n].
        codes: last ids of the code rows, [n, K].
        text_done: whether the text has ended, bool [n].
        automaton: what is legal in the code rows; None if the task does not speak.
        generators: source of each conversation's draws; empty if nothing is drawn.
        seen_text: ids that came before, bool [n, V]; None without a repetition penalty.
        seen_codes: likewise, bool [n, K, V].
        given: texts that are fed instead of sampled, one per conversation; None if text is sampled.
        text_logits: logits of the next step, [rows, V].
        code_logits: likewise of the rows that speak, [rows, K, V].
    """

    rows: list[Row]
    cache: OmniCache
    attention_mask: Tensor | None
    positions: Tensor
    max_steps: Tensor
    context_limited: Tensor
    text: Tensor
    codes: Tensor
    text_done: Tensor
    automaton: CodeRows | None
    generators: list[torch.Generator]
    seen_text: Tensor | None
    seen_codes: Tensor | None
    given: list[tuple[int, ...]] | None
    text_logits: Tensor
    code_logits: Tensor | None
    step: int = 0

    @property
    def num_speaking(self) -> int:
        """Rows that carry codes; they come first."""
        return sum(row.role != "text" for row in self.rows) if self.automaton else 0


class Decoder:
    """Runs the loop for one model, task and setting. Holds no state of a decode.

    Args:
        model: the talking model.
        rules: ids and delays of its grids.
        task: what is asked of it.
        text_end_ids: ids that end a text.
        settings: how to decode.

    Raises:
        ConfigError: if ``max_new_tokens`` is too small for every code row to end.
    """

    def __init__(
        self,
        model: OmniModel,
        *,
        rules: GridRules,
        task: Task,
        text_end_ids: Sequence[int],
        settings: GenerationSettings,
    ) -> None:
        self.model, self.rules, self.task, self.settings = model, rules, task, settings
        self.text_end_ids = torch.tensor(text_end_ids, device=model.device)
        least = CodeAutomaton.least_steps(rules.delays)
        if task.speaks and settings.max_new_tokens < least:
            raise ConfigError(
                f"max_new_tokens must be at least {least} for speech with delays {rules.delays}, "
                f"got {settings.max_new_tokens}"
            )

    @property
    def splits_rows(self) -> bool:
        """Whether text and speech of a conversation run in rows of their own."""
        return self.task.speaks and self.settings.batch_parallel and not self.task.text_given

    def run(
        self, samples: Sequence[Sample], *, given: Sequence[tuple[int, ...]] | None = None
    ) -> Generator[Step, None, None]:
        """Yield the steps of all conversations until the last one has ended.

        Prompts of different lengths are padded into one batch where the base computes padded rows exactly;
        else each conversation runs apart, one step in turn.

        Args:
            samples: prompts without answers.
            given: text ids of each conversation, for tasks whose text is known.

        Raises:
            ContextOverflowError: if a prompt leaves no room for a reply in the base's positions.
            PromptError: if ``given`` does not go with the task.
        """
        if self.task.text_given != (given is not None):
            expected = "one text per conversation" if self.task.text_given else "no given text"
            raise PromptError(f"this task takes {expected}")
        lengths = {sample.layout.grid.shape[1] for sample in samples}
        if len(lengths) == 1 or self.model.backbone.padding_is_exact:
            lanes = [list(range(len(samples)))]
        else:
            logger.info("this base is not exact under padding; %d conversations run apart", len(samples))
            lanes = [[index] for index in range(len(samples))]
        running = [
            (lane, self._run_lane([samples[i] for i in lane], [given[i] for i in lane] if given else None))
            for lane in lanes
        ]
        while running:
            for entry in list(running):
                lane, steps = entry
                step = next(steps, None)
                if step is None:
                    running.remove(entry)
                else:
                    yield step._replace(conversations=tuple(lane[index] for index in step.conversations))

    def _run_lane(
        self, samples: Sequence[Sample], given: list[tuple[int, ...]] | None
    ) -> Generator[Step, None, None]:
        state = self.prefill(collate(samples, rules=self.rules).to(self.model.device), given=given)
        while True:
            step = self.choose(state)
            yield step
            self._drop_finished(state, step)
            if not state.rows:
                return
            self.advance(state)

    @torch.no_grad()
    def prefill(self, batch: Batch, *, given: list[tuple[int, ...]] | None = None) -> DecodingState:
        """Read the prompts and return the state before the first step.

        With batch-parallel decoding all but the last column is the same for both rows of a conversation: it
        is read once, its cache is expanded, and the rows part at the task's mark.
        """
        self._check_context(batch)
        count, device = batch.grid.shape[0], batch.grid.device
        mask = batch.attention_mask if batch.is_padded else None
        state = self._fresh_state(batch, mask, given)
        heard = self.model.hear(batch.clips) if batch.clips is not None else []
        embeddings = self.model.embed(batch.grid, places=batch.places, heard=heard)
        positions = batch.position_ids if mask is not None else None
        if not self.splits_rows:
            state.rows = [Row(index, "joint") for index in range(count)]
            self._read(state, embeddings, mask, positions)
            return state
        state.rows = [Row(index, "speech") for index in range(count)]
        if embeddings.shape[1] > 1:
            prefix_mask = mask[:, :-1] if mask is not None else None
            prefix_positions = positions[:, :-1] if positions is not None else None
            self._read(state, embeddings[:, :-1], prefix_mask, prefix_positions)
        twice = torch.arange(count, device=device).repeat(2)
        if state.cache.backbone is not None:
            state.cache.backbone = self.model.backbone.select_rows(state.cache.backbone, twice)
        state.rows += [Row(index, "text") for index in range(count)]
        state.attention_mask = mask[twice] if mask is not None else None
        last = batch.grid[:, :, -1:][twice]  # [2B, K + 1, 1]
        last[count:, :-1] = self.rules.silent_mark
        last_positions = positions[:, -1:][twice] if positions is not None else None
        self._read(state, self.model.embed(last), state.attention_mask, last_positions)
        return state

    @torch.no_grad()
    def choose(self, state: DecodingState) -> Step:
        """Choose the ids of the next step and write them into the state."""
        uniform = self._draw(state)
        speaking = [row.conversation for row in state.rows[: state.num_speaking]]
        writing = [index for index, row in enumerate(state.rows) if row.role != "speech"]
        writing = [index for index in writing if not bool(state.text_done[state.rows[index].conversation])]
        alive = sorted({row.conversation for row in state.rows})
        state.text[:] = self.rules.no_text
        if writing:
            self._choose_text(state, writing, uniform)
        if state.automaton is not None:
            self._choose_codes(state, speaking, uniform)
        state.step += 1
        finished = self._finished(state, alive)
        chosen = torch.tensor(alive, device=state.text.device)
        return Step(tuple(alive), state.text[chosen], state.codes[chosen], finished)

    @torch.no_grad()
    def advance(self, state: DecodingState) -> None:
        """Feed the chosen ids to the model, so that the next step can be chosen."""
        owners = torch.tensor([row.conversation for row in state.rows], device=state.text.device)
        grid = torch.cat((state.codes[owners], state.text[owners, None]), dim=1)[..., None]  # [R, K + 1, 1]
        grid[state.num_speaking :, :-1] = self.rules.vocabulary.pad
        positions = None
        if state.attention_mask is not None:
            new = state.attention_mask.new_ones(len(state.rows), 1)
            state.attention_mask = torch.cat((state.attention_mask, new), dim=1)
            positions = (state.positions[owners] + state.step - 1)[:, None]
        self._read(state, self.model.embed(grid), state.attention_mask, positions)

    def _read(
        self, state: DecodingState, embeddings: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> None:
        """Run the model over new steps [R, S, D] and keep the last one's logits."""
        output = self.model.backbone(
            embeddings,
            attention_mask=mask,
            position_ids=positions,
            cache=state.cache.backbone,
            use_cache=True,
            logits_to_keep=1,
        )
        state.cache.backbone = output.cache
        state.text_logits = output.logits[:, -1]
        speaking = state.num_speaking
        if speaking:
            state.code_logits = self.model.speak(
                output.tapped[:speaking],
                attention_mask=mask[:speaking] if mask is not None else None,
                position_ids=positions[:speaking] if positions is not None else None,
                cache=state.cache.tts,
                steps_to_keep=1,
            )[:, :, -1]  # [speaking, K, V]

    def _choose_text(self, state: DecodingState, writing: list[int], uniform: Tensor | None) -> None:
        """Sample, or take as given, the text of the rows ``writing``."""
        owners = torch.tensor([state.rows[index].conversation for index in writing], device=state.text.device)
        if state.given is not None:
            ids = torch.tensor([state.given[owner][state.step] for owner in owners.tolist()]).to(owners)
            over = torch.tensor([state.step + 1 == len(state.given[owner]) for owner in owners.tolist()])
            state.text[owners], state.text_done[owners] = ids, over.to(owners.device)
            return
        logits = state.text_logits[writing]
        if state.seen_text is not None:
            logits = penalise(logits, state.seen_text[owners], self.settings.text_sampling.repetition_penalty)
        ids = sample(
            logits, self.settings.text_sampling, uniform=None if uniform is None else uniform[owners, -1]
        )
        if state.seen_text is not None:
            state.seen_text[owners, ids] = True
        state.text[owners] = ids
        state.text_done[owners] = torch.isin(ids, self.text_end_ids)

    def _choose_codes(self, state: DecodingState, speaking: list[int], uniform: Tensor | None) -> None:
        """Sample the codes of the conversations ``speaking`` under the automaton."""
        automaton = state.automaton
        assert automaton is not None
        drawn = torch.zeros_like(state.codes)
        if speaking:
            assert state.code_logits is not None
            owners = torch.tensor(speaking, device=drawn.device)
            logits = state.code_logits
            if state.seen_codes is not None:
                logits = penalise(
                    logits, state.seen_codes[owners], self.settings.code_sampling.repetition_penalty
                )
            logits = automaton.mask(logits)
            numbers = None if uniform is None else uniform[owners, :-1].flatten()
            ids = sample(logits.flatten(0, 1), self.settings.code_sampling, uniform=numbers)
            drawn[owners] = ids.view(len(speaking), -1)
            if state.seen_codes is not None:
                state.seen_codes[owners] = state.seen_codes[owners].scatter(
                    -1, drawn[owners][..., None], True
                )
        state.codes = automaton.advance(drawn)
        if automaton.ends_text:
            state.text[automaton.finished] = self.rules.no_text
            state.text_done |= automaton.finished

    def _finished(self, state: DecodingState, alive: Sequence[int]) -> tuple[FinishReason | None, ...]:
        """Why each running conversation ends with this step, if it does."""
        silent = state.automaton.finished if state.automaton else torch.ones_like(state.text_done)
        cut = state.automaton.cut if state.automaton else torch.zeros_like(state.text_done)
        natural = (state.text_done & silent).tolist()
        out_of_steps = (state.step >= state.max_steps).tolist()
        shortened = (cut | ~(state.text_done & silent)).tolist()
        by_context = state.context_limited.tolist()
        reasons: list[FinishReason | None] = []
        for index in alive:
            if not natural[index] and not out_of_steps[index]:
                reasons.append(None)
            elif not shortened[index]:
                reasons.append("end")
            else:
                reasons.append("context" if by_context[index] else "length")
        return tuple(reasons)

    @torch.no_grad()
    def _drop_finished(self, state: DecodingState, step: Step) -> None:
        """Drop rows that have nothing more to say from the batch and the caches."""
        over = {c for c, reason in zip(step.conversations, step.finished, strict=True) if reason}
        silent = state.automaton.finished.tolist() if state.automaton else None
        written = state.text_done.tolist()

        def has_more(row: Row) -> bool:
            if row.conversation in over:
                return False
            if row.role == "speech":
                return not (silent and silent[row.conversation])
            return row.role == "joint" or not written[row.conversation]

        kept = [index for index, row in enumerate(state.rows) if has_more(row)]
        if len(kept) == len(state.rows):
            return
        speaking = [index for index in kept if index < state.num_speaking]
        if kept:
            indices = torch.tensor(kept, device=state.text.device)
            state.cache.backbone = self.model.backbone.select_rows(state.cache.backbone, indices)
            state.cache.tts.select_rows(torch.tensor(speaking, device=state.text.device, dtype=torch.long))
            if state.attention_mask is not None:
                state.attention_mask = state.attention_mask[indices]
        state.rows = [state.rows[index] for index in kept]

    def _draw(self, state: DecodingState) -> Tensor | None:
        """One number in [0, 1) for each conversation and row, [n, K + 1]; None if nothing is drawn."""
        if not state.generators:
            return None
        rows = self.rules.num_codebooks + 1
        return torch.stack([torch.rand(rows, generator=g) for g in state.generators]).to(state.text.device)

    def _check_context(self, batch: Batch) -> None:
        """Refuse prompts that leave no room for a reply."""
        limit = self.model.backbone.max_positions
        least = CodeAutomaton.least_steps(self.rules.delays) if self.task.speaks else 1
        longest = int(batch.attention_mask.sum(dim=1).max())
        if limit is not None and longest + least > limit:
            raise ContextOverflowError(
                f"the prompt takes {longest} steps and the base LM knows {limit} positions, which leaves no "
                f"room for a reply of at least {least}; use a shorter recording, fewer turns, or a larger "
                "audio_adapter.stack"
            )

    def _fresh_state(
        self, batch: Batch, mask: Tensor | None, given: list[tuple[int, ...]] | None
    ) -> DecodingState:
        """The state before anything was read."""
        count, device = batch.grid.shape[0], batch.grid.device
        lengths = batch.attention_mask.sum(dim=1)
        max_steps = torch.full_like(lengths, self.settings.max_new_tokens)
        context_limited = torch.zeros_like(lengths, dtype=torch.bool)
        limit = self.model.backbone.max_positions
        if limit is not None:
            context_limited = limit - lengths < max_steps
            max_steps = max_steps.minimum(limit - lengths)
        rules, settings = self.rules, self.settings
        draws = not (settings.text_sampling.is_greedy and settings.code_sampling.is_greedy)
        automaton = None
        if self.task.speaks:
            automaton = CODE_ROWS[rules.code_rule](
                rules.vocabulary, delays=rules.delays, max_steps=max_steps, device=device
            )
        seen_text = seen_codes = None
        if settings.text_sampling.repetition_penalty != 1:
            seen_text = torch.zeros(count, self.model.backbone.vocab_size, dtype=torch.bool, device=device)
            prompt_text = batch.grid[:, -1].clamp(min=0)
            seen_text.scatter_(1, prompt_text, batch.grid[:, -1] >= 0)
        if settings.code_sampling.repetition_penalty != 1:
            shape = (count, rules.num_codebooks, rules.vocabulary.size)
            seen_codes = torch.zeros(shape, dtype=torch.bool, device=device)
        return DecodingState(
            rows=[],
            cache=OmniCache(),
            attention_mask=mask,
            positions=lengths,
            max_steps=max_steps,
            context_limited=context_limited,
            text=torch.full((count,), rules.no_text, device=device),
            codes=torch.full((count, rules.num_codebooks), rules.vocabulary.pad, device=device),
            text_done=torch.zeros(count, dtype=torch.bool, device=device),
            automaton=automaton,
            generators=[torch.Generator().manual_seed(settings.seed) for _ in range(count)] if draws else [],
            seen_text=seen_text,
            seen_codes=seen_codes,
            given=given,
            text_logits=torch.empty(0, device=device),
            code_logits=None,
        )
