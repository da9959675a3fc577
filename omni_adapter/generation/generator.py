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
from omni_adapter.generation.state import DecodingState, Draws, Given, Role, Row, keep_cache_rows
from omni_adapter.model import OmniCache, OmniModel
from omni_adapter.modules.tts_blocks import TtsCache

logger = logging.getLogger(__name__)

FinishReason = Literal["end", "length", "context"]


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
        lookahead_frames: frames behind a sample's own that its sound waits for; None for all that matter,
            which makes it exact. Fewer make it come sooner, with an error (see ``CodecStream``).
    """

    max_new_tokens: int = 1024
    text_sampling: SamplingSettings = field(default_factory=SamplingSettings)
    code_sampling: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    batch_parallel: bool = True
    stride: int = 4
    lookahead_frames: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.stride < 1:
            raise ConfigError(f"stride must be at least 1 frame, got {self.stride}")
        if self.lookahead_frames is not None and self.lookahead_frames < 0:
            raise ConfigError(f"lookahead_frames must be at least 0, or None, got {self.lookahead_frames}")


class Step(NamedTuple):
    """What one step of the loop brought, for the conversations still running.

    Attributes:
        conversations: their indices in the batch, length n.
        text: text ids, [n]; the rules' ``no_text`` after the end of a text. On the host.
        codes: delayed ids of the code rows, [n, K]; pad where a row has none. On the host.
        finished: why a conversation ended with this step, or None if it goes on; length n.
    """

    conversations: tuple[int, ...]
    text: Tensor
    codes: Tensor
    finished: tuple[FinishReason | None, ...]


_MOST_RESERVED = 1 << 14  # columns; longer replies take memory as they go on


class Decoder:
    """Runs the loop for one model, task and setting. Holds no state of a decode.

    A prompt is read once, in as many pieces as it comes in: ``open``, ``read`` for each piece, ``close`` with
    the last; ``prefill`` is these for a prompt that is there as a whole. From then on ``choose`` and
    ``advance`` take turns; ``steps`` runs them to the end.

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
        self.text_end_ids = torch.tensor(text_end_ids, dtype=torch.long, device=model.device)
        self._text_end = text_end_ids[0] if len(text_end_ids) == 1 else None
        # Where the host only queues work, the next pass is queued before the ids of this step are waited for.
        self.runs_ahead = model.device.type != "cpu"
        if settings.max_new_tokens < self.least_steps:
            raise ConfigError(
                f"max_new_tokens must be at least {self.least_steps} for speech with delays {rules.delays}, "
                f"got {settings.max_new_tokens}"
            )

    @property
    def least_steps(self) -> int:
        """Steps that a reply takes at least: in speech, those in which every code row can end."""
        return CodeAutomaton.least_steps(self.rules.delays) if self.task.speaks else 1

    @property
    def splits_rows(self) -> bool:
        """Whether text and speech of a conversation run in rows of their own."""
        return self.task.speaks and self.settings.batch_parallel and not self.task.text_given

    # --- whole replies ---

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
        self, samples: Sequence[Sample], given: Sequence[tuple[int, ...]] | None
    ) -> Generator[Step, None, None]:
        state = self.prefill(collate(samples, rules=self.rules).to(self.model.device), given=given)
        yield from self.steps(state)

    def steps(self, state: DecodingState) -> Generator[Step, None, None]:
        """Yield the steps of prompts that were read, until the last conversation has ended."""
        while state.rows:
            yield from self.turn(state)

    def turn(self, state: DecodingState) -> Generator[Step, None, None]:
        """Yield the next step, once, then drop what has ended and feed the rest."""
        ids = self._choose(state)
        if self.runs_ahead:
            self.advance(state)
        step = self._report(state, ids)
        yield step
        self._drop_finished(state, step)
        if state.rows and not self.runs_ahead:
            self.advance(state)

    # --- prompts ---

    @torch.inference_mode()
    def prefill(
        self,
        batch: Batch,
        *,
        given: Sequence[tuple[int, ...]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> DecodingState:
        """Read whole prompts and return the state before the first step.

        Args:
            batch: prompts, padded on the left.
            given: text ids of each conversation, for tasks whose text is known.
            seeds: of each conversation's draws; None takes that of the settings.
        """
        columns = batch.grid.shape[-1]
        padding = (columns - batch.attention_mask.sum(dim=1)).tolist()
        state = self.open(padding=padding, prompt_steps=columns, given=given, seeds=seeds)
        heard = self.model.hear(batch.clips) if batch.clips is not None else []
        self.close(state, batch.grid, places=batch.places, heard=heard)
        return state

    @torch.inference_mode()
    def open(
        self,
        *,
        padding: Sequence[int] = (0,),
        prompt_steps: int | None = None,
        given: Sequence[tuple[int, ...]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> DecodingState:
        """Return the state of conversations of whose prompts nothing was read yet.

        Args:
            padding: columns before the first step of each prompt; its length is that of the batch.
            prompt_steps: columns that the prompts take at most, so that memory for prompt and reply is made
                at once; None makes it as they come.
            given: text ids of each conversation, for tasks whose text is known.
            seeds: of each conversation's draws; None takes that of the settings.

        Raises:
            ContextOverflowError: if the longest prompt leaves no room for a reply.
            PromptError: if ``given`` does not go with the task.
        """
        if self.task.text_given != (given is not None):
            expected = "one text per conversation" if self.task.text_given else "no given text"
            raise PromptError(f"this task takes {expected}")
        capacity = None
        if prompt_steps is not None:
            self._check_context(prompt_steps - min(padding))
            wanted = self.columns(prompt_steps, padding=min(padding))
            capacity = wanted if wanted <= _MOST_RESERVED else None
        seeds = [self.settings.seed] * len(padding) if seeds is None else seeds
        state = self._fresh(padding, seeds=seeds, given=given, capacity=capacity)
        role: Role = "text" if not self.task.speaks else "speech" if self.splits_rows else "joint"
        state.set_rows([Row(index, role) for index in range(len(padding))])
        return state

    @torch.inference_mode()
    def read(
        self,
        state: DecodingState,
        grid: Tensor,
        *,
        places: Sequence[tuple[int, int, int]] = (),
        heard: Sequence[Tensor] = (),
    ) -> None:
        """Read the next columns of prompts that go on.

        Args:
            state: of ``open``, changed in place.
            grid: ids, [n, K + 1, s] with s >= 0, as the layout of the whole prompt has them.
            places: conversation, first column in ``grid`` and number of columns of each recording in it.
            heard: embeddings of each of those recordings, [A, D].

        Raises:
            ContextOverflowError: if no room is left for a reply.
        """
        if not grid.shape[-1]:
            return
        self._check_context(state.length + grid.shape[-1] - min(state.padding))
        self._note_text(state, grid)
        self._pass(state, self.model.embed(grid, places=places, heard=heard), read_off=False)

    @torch.inference_mode()
    def close(
        self,
        state: DecodingState,
        grid: Tensor,
        *,
        places: Sequence[tuple[int, int, int]] = (),
        heard: Sequence[Tensor] = (),
    ) -> None:
        """Read the last columns of the prompts, so that the first step can be chosen.

        With batch-parallel decoding all but the very last column is the same for both rows of a conversation:
        it is read once, its cache is expanded, and the rows part at the task's mark. A few columns are read
        twice instead: side by side that takes no longer than reading the last column by itself.

        Args:
            state: of ``open``, changed in place.
            grid: ids, [n, K + 1, s] with s >= 1; the last column bears the task's mark.
            places: as for ``read``.
            heard: likewise.

        Raises:
            ContextOverflowError: if no room is left for a reply.
        """
        self._check_context(state.length + grid.shape[-1] - min(state.padding))
        self._limit_steps(state, state.length + grid.shape[-1])
        if not self.splits_rows:
            self._note_text(state, grid)
            self._pass(state, self.model.embed(grid, places=places, heard=heard))
            return
        if len(grid) * grid.shape[-1] > self.model.backbone.cheap_columns:
            self.read(state, grid[..., :-1], places=places, heard=heard)
            grid, places, heard = grid[..., -1:], (), ()
        count = len(grid)
        self._note_text(state, grid)
        if state.cache.backbone is not None:
            twice = torch.arange(count, device=grid.device).repeat(2)
            state.cache.backbone = self.model.backbone.select_rows(state.cache.backbone, twice)
        state.set_rows([*state.rows, *(Row(index, "text") for index in range(count))])
        both = grid.repeat(2, 1, 1)
        both[count:, :-1, -1] = self.rules.silent_mark
        beside = [(count + index, first, length) for index, first, length in places]
        self._pass(state, self.model.embed(both, places=[*places, *beside], heard=[*heard, *heard]))

    # --- steps ---

    @torch.inference_mode()
    def choose(self, state: DecodingState) -> Step:
        """Choose the ids of the next step and write them into the state."""
        return self._report(state, self._choose(state))

    @torch.inference_mode()
    def advance(self, state: DecodingState) -> None:
        """Feed the chosen ids to the model, so that the next step can be chosen."""
        plan = state.plan
        grid = state.last.index_select(0, plan.owners)  # [R, K + 1]
        grid[plan.silent, :-1] = self.rules.vocabulary.pad
        self._pass(state, self.model.embed(grid[..., None]))

    def _drop_finished(self, state: DecodingState, step: Step) -> None:
        """Drop what has nothing more to say from the batch and the caches: rows, and whole conversations."""
        over = [reason is not None for reason in step.finished]

        def has_more(row: Row) -> bool:
            if over[row.conversation]:
                return False
            if row.role == "speech":
                return not state.said[row.conversation]
            return row.role == "joint" or not state.written[row.conversation]

        self.keep_rows(state, [index for index, row in enumerate(state.rows) if has_more(row)])

    @torch.inference_mode()
    def keep_rows(self, state: DecodingState, kept: Sequence[int]) -> None:
        """Drop all rows but those at ``kept``, and conversations that are left without any.

        Nothing of what is dropped can be reached from the state afterwards.
        """
        if len(kept) == len(state.rows):
            return
        rows = [state.rows[index] for index in kept]
        speaking = [index for index, row in enumerate(state.rows) if row.role != "text"]
        writing = [index for index, row in enumerate(state.rows) if row.role != "speech"]
        chosen = set(kept)
        spoken = [place for place, index in enumerate(speaking) if index in chosen]
        wrote = [place for place, index in enumerate(writing) if index in chosen]
        keep_cache_rows(state.cache, kept, spoken, self.model.backbone)
        if state.code_logits is not None:
            state.code_logits = state.code_logits[spoken]
        if state.write_logits is not None:
            state.write_logits = state.write_logits[wrote]
        state.set_rows(rows)
        state.keep_conversations(sorted({row.conversation for row in rows}))
        state.trim()

    @torch.inference_mode()
    def join(self, state: DecodingState, newcomers: DecodingState) -> None:
        """Put conversations that are at any step of theirs beside those of ``state``.

        What each of them says from then on is what it would have said alone: rows of fewer columns are padded
        in front. ``newcomers`` is consumed.

        Args:
            state: of ``vacant`` or ``close``, with memory made at once; changed in place.
            newcomers: of ``close``, decoded with the same sampling settings.

        Raises:
            BackboneError: if the LM's state is none that rows can join; see ``joins``.
            ContextOverflowError: if a newcomer has more columns than ``state`` has room for.
        """
        state.join(newcomers)

    @property
    def joins(self) -> bool:
        """Whether conversations can join others that run, and still come out as they do alone."""
        return self.model.backbone.rows_can_join

    @torch.inference_mode()
    def vacant(self, *, conversations: int, capacity: int) -> DecodingState:
        """Return a state without conversations, with memory for as many as will ``join``.

        Args:
            conversations: at most at once.
            capacity: columns of prompt and reply of each of them at most.
        """
        state = self._fresh((), seeds=(), given=None, capacity=capacity, room=conversations)
        keep_cache_rows(state.cache, (), (), self.model.backbone)
        return state

    @torch.inference_mode()
    def _choose(self, state: DecodingState) -> Tensor:
        """Choose the next ids without waiting for the device.

        Returns:
            Ids as on the grid, then whether the text is over, the codes are, and speech was cut, [n, K + 4].
        """
        uniform = state.draws.take() if state.draws else None
        text, codes, automaton = self._choose_text(state, uniform), state.last[:, :-1], state.automaton
        said, cut = state.silent, state.talks  # whether speech was cut counts only where there is some
        if automaton is not None:
            codes = self._choose_codes(state, automaton, uniform)
            said, cut = automaton.finished, automaton.at_limit
            if not all(state.speaks):
                codes = codes.masked_fill(state.silent[:, None], self.rules.vocabulary.pad)
                said, cut = said | state.silent, cut & state.talks
            if automaton.ends_text:
                over = said & state.talks
                text = text.masked_fill(over, self.rules.no_text)
                state.text_done = state.text_done | over
        columns = (codes, *(column[:, None] for column in (text, state.text_done, said, cut)))
        chosen = torch.cat(columns, dim=1)
        state.last = chosen[:, :-3]
        return chosen

    def _report(self, state: DecodingState, chosen: Tensor) -> Step:
        """Read what was chosen, and say who has ended."""
        chosen = chosen.cpu()  # the one wait of a step
        flags = chosen[:, -3:].tolist()
        written, said, cut = ([bool(flag[at]) for flag in flags] for at in range(3))
        state.steps = [done + 1 for done in state.steps]
        if written != state.written:
            state.refresh()
        state.written, state.said = written, said
        reasons = tuple(self._reason(state, index, cut=cut[index]) for index in range(len(flags)))
        return Step(tuple(state.names), chosen[:, -4], chosen[:, :-4], reasons)

    @staticmethod
    def _reason(state: DecodingState, index: int, *, cut: bool) -> FinishReason | None:
        """Why a conversation ends with this step, None if it goes on."""
        natural = state.written[index] and state.said[index]
        if not natural and state.steps[index] < state.max_steps[index]:
            return None
        if natural and not cut:
            return "end"
        return "context" if state.context_limited[index] else "length"

    def _choose_text(self, state: DecodingState, uniform: Tensor | None) -> Tensor:
        """Sample the text of the rows that write, or take it as given; return all texts, [n]."""
        plan, settings = state.plan, self.settings.text_sampling
        ids = None
        if state.write_logits is not None:
            logits = state.write_logits
            if state.seen_text is not None:
                logits = penalise(logits, state.seen_text[plan.writers], settings.repetition_penalty)
            ids = sample(logits, settings, uniform=None if uniform is None else uniform[plan.writers, -1])
            if state.seen_text is not None:
                seen = state.seen_text[plan.writers].scatter(1, ids[:, None], True)
                state.seen_text[plan.writers] = seen
        if ids is not None and plan.all_write:
            text = ids
        else:
            text = torch.full_like(state.text_done, self.rules.no_text, dtype=torch.long)
            if ids is not None:
                text[plan.writers] = ids
        if self._text_end is not None:
            over = text == self._text_end
        else:
            over = (text[:, None] == self.text_end_ids).any(dim=1)
        if (given := state.given) is not None:
            fed = given.ids.gather(1, given.step.clamp(max=given.ids.shape[1] - 1)[:, None])[:, 0]
            given.step = given.step + 1
            text = torch.where(given.lengths > 0, fed, text)
            over = torch.where(given.lengths > 0, given.step >= given.lengths, over)
        if any(state.written):
            text = text.masked_fill(state.text_done, self.rules.no_text)
        state.text_done = state.text_done | over
        return text

    def _choose_codes(self, state: DecodingState, automaton: CodeRows, uniform: Tensor | None) -> Tensor:
        """Sample the codes of the rows that speak under the automaton; return all codes, [n, K]."""
        speakers, drawn = state.plan.speakers, None
        if state.code_logits is not None:
            logits, settings = state.code_logits, self.settings.code_sampling
            if state.seen_codes is not None:
                logits = penalise(logits, state.seen_codes[speakers], settings.repetition_penalty)
            logits = automaton.mask(logits)
            numbers = None if uniform is None else uniform[speakers, :-1].flatten()
            ids = sample(logits.flatten(0, 1), settings, uniform=numbers).view(logits.shape[:2])
            drawn = ids
            if not state.plan.all_speak:
                drawn = torch.zeros_like(state.last[:, :-1])
                drawn[speakers] = ids
            if state.seen_codes is not None:
                state.seen_codes[speakers] = state.seen_codes[speakers].scatter(-1, ids[..., None], True)
        return automaton.advance(torch.zeros_like(state.last[:, :-1]) if drawn is None else drawn)

    def _fresh(
        self,
        padding: Sequence[int],
        *,
        seeds: Sequence[int],
        given: Sequence[tuple[int, ...]] | None,
        capacity: int | None,
        room: int | None = None,
    ) -> DecodingState:
        """A state that has read nothing and has no rows, with ``room`` for so many conversations to join."""
        count, device, speaks = len(padding), self.model.device, self.task.speaks
        rules, text, codes = self.rules, self.settings.text_sampling, self.settings.code_sampling
        last = torch.full((count, rules.num_codebooks + 1), rules.vocabulary.pad, device=device)
        last[:, -1] = rules.no_text
        state = DecodingState(
            names=list(range(count)),
            rows=[],
            cache=OmniCache(),
            capacity=capacity,
            padding=list(padding),
            speaks=[speaks] * count,
            has_given=[given is not None] * count,
            steps=[0] * count,
            max_steps=[0] * count,
            context_limited=[False] * count,
            written=[False] * count,
            said=[not speaks] * count,
            last=last,
            text_done=torch.zeros(count, dtype=torch.bool, device=device),
            talks=torch.full((count,), speaks, device=device),
            silent=torch.full((count,), not speaks, device=device),
            given=Given.of(given, device=device) if given is not None else None,
        )
        if capacity is not None:
            rows = count if room is None else 2 * room
            tts = TtsCache(capacity=capacity, rows=count if room is None else room)
            state.cache = OmniCache(self.model.backbone.new_cache(rows, capacity), tts)
        if not (text.is_greedy and codes.is_greedy):
            state.draws = Draws(seeds, width=rules.num_codebooks + 1, device=device)
        if text.repetition_penalty != 1:
            shape = (count, self.model.backbone.vocab_size)
            state.seen_text = torch.zeros(shape, dtype=torch.bool, device=device)
        if codes.repetition_penalty != 1:
            grid = (count, rules.num_codebooks, rules.vocabulary.size)
            state.seen_codes = torch.zeros(grid, dtype=torch.bool, device=device)
        return state

    # --- passes ---

    def _pass(self, state: DecodingState, embeddings: Tensor, *, read_off: bool = True) -> None:
        """Run the model over new columns [R, S, D]; keep the last one's logits if they are to be read off."""
        plan, steps = state.plan, embeddings.shape[1]
        mask, positions = state.attention(steps)
        writes = read_off and plan.num_sampled > 0
        # The head is the LM's largest matrix: it is run over the rows that write, and over none if none does.
        apart = writes and plan.num_writing < len(state.rows) and self.model.backbone.projects
        # What the TTS blocks have seen ends where the LM's columns end, but may begin later.
        heard = state.cache.tts.length + steps
        output = self.model.backbone(
            embeddings,
            attention_mask=mask,
            position_ids=positions,
            cache=state.cache.backbone,
            use_cache=True,
            logits_to_keep=1 if writes and not apart else None,
        )
        state.cache.backbone = output.cache
        state.write_logits = None
        if apart:
            state.write_logits = self.model.backbone.project(output.hidden[plan.writing, -1:])[:, -1]
        elif writes:
            state.write_logits = output.logits[plan.writing, -1]
        state.code_logits = None
        if plan.num_speaking:
            logits = self.model.speak(
                output.tapped[plan.speaking],
                attention_mask=mask[plan.speaking, -heard:] if mask is not None else None,
                position_ids=positions[plan.speaking] if positions is not None else None,
                cache=state.cache.tts,
                steps_to_keep=1 if read_off else None,
            )  # [P, K, 1 or 0, V]
            state.code_logits = logits[:, :, -1] if read_off else None
        state.length += steps

    def _check_context(self, prompt_steps: int) -> None:
        """Refuse prompts that leave no room for a reply."""
        limit = self.model.backbone.max_positions
        if limit is not None and prompt_steps + self.least_steps > limit:
            raise ContextOverflowError(
                f"the prompt takes {prompt_steps} steps and the base LM knows {limit} positions, which "
                f"leaves no room for a reply of at least {self.least_steps}; use a shorter recording, fewer "
                "turns, or a larger audio_adapter.stack"
            )

    def columns(self, prompt_steps: int, *, padding: int = 0) -> int:
        """Columns that a prompt, padded in front, and its reply take at most."""
        limit, wanted = self.model.backbone.max_positions, prompt_steps + self.settings.max_new_tokens
        if limit is not None:
            wanted = min(wanted, limit + padding)
        return wanted + 1  # a reply that is over may be fed on once before that is known

    def _limit_steps(self, state: DecodingState, columns: int) -> None:
        """Count how many steps each reply may have after a prompt that ends at ``columns``."""
        limit, wanted = self.model.backbone.max_positions, self.settings.max_new_tokens
        room = [None if limit is None else limit - (columns - padding) for padding in state.padding]
        state.max_steps = [wanted if left is None else min(wanted, left) for left in room]
        state.context_limited = [left is not None and left < wanted for left in room]
        if self.task.speaks:
            state.automaton = CODE_ROWS[self.rules.code_rule](
                self.rules.vocabulary,
                delays=self.rules.delays,
                max_steps=torch.tensor(state.max_steps, device=state.last.device),
                device=state.last.device,
            )

    def _note_text(self, state: DecodingState, grid: Tensor) -> None:
        """Remember which text ids the prompts hold, for the repetition penalty."""
        if state.seen_text is not None:
            ids = grid[:, -1]
            conversations, columns = (ids >= 0).nonzero(as_tuple=True)
            state.seen_text[conversations, ids[conversations, columns]] = True
