"""The LM with everything that was grafted onto it: a grid of ids and recordings in, text and code logits out.

Grid [B, K + 1, S] and clips -> text logits [B, S, V] and code logits [B, K, S, V]. Knows nothing of
tokenizers, chat templates, codecs or decoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.audio.clips import Clips
from omni_adapter.backbone import Backbone, is_lora
from omni_adapter.config import OmniConfig
from omni_adapter.errors import ConfigError, PromptError
from omni_adapter.modules.audio_adapter import AudioAdapter
from omni_adapter.modules.audio_encoder import AudioEncoder
from omni_adapter.modules.code_embedding import CodeEmbedding
from omni_adapter.modules.code_heads import CodeHeads
from omni_adapter.modules.tts_blocks import TtsBlocks, TtsCache, round_up

ADDED_GROUPS = ("audio_adapter", "code_embedding", "tts_blocks", "code_heads")
"""Weight groups that wrapping adds; with ``lora`` they are all that is saved."""


@dataclass
class OmniCache:
    """State of a decode between steps; owned by the caller.

    Attributes:
        backbone: whatever the LM returned as its cache.
        tts: keys and values of the TTS blocks.
    """

    backbone: Any = None
    tts: TtsCache = field(default_factory=TtsCache)


class OmniOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        text_logits: the LM's own, [B, S, V].
        code_logits: one set per code row, [B, K, S, V].
        hidden: states that enter the LM's head, [B, S, D].
        cache: state for the next step, None unless one was passed in.
    """

    text_logits: Tensor
    code_logits: Tensor
    hidden: Tensor
    cache: OmniCache | None


class OmniModel(nn.Module):
    """A language model that hears and speaks (paper, figure 1).

    Args:
        backbone: the language model.
        audio_encoder: frozen encoder of recordings.
        config: shapes of what is added.

    Raises:
        ConfigError: if a width in ``config`` is not that of the part.
        BackboneError: if the TTS blocks are to read what enters the LM's final norm, and it has none.
    """

    def __init__(self, backbone: Backbone, audio_encoder: AudioEncoder, *, config: OmniConfig) -> None:
        super().__init__()
        for name, expected, got in (
            ("width", config.width, backbone.width),
            ("hidden_width", config.hidden_width, backbone.hidden_width),
            ("encoder_width", config.encoder_width, audio_encoder.width),
        ):
            if expected != got:
                raise ConfigError(f"{name} is {expected} in the config, but the part at hand has {got}")
        self.config = config
        self.backbone = backbone
        self.audio_encoder = audio_encoder
        self.encoder_block_steps = audio_encoder.block_steps(config.encoder_block_seconds)
        if config.tts.input == "before_norm":
            backbone.tap_final_norm()
        rows, vocabulary = config.codec_spec.num_codebooks, config.vocabulary
        self.audio_adapter = AudioAdapter(
            in_width=config.encoder_width,
            out_width=config.width,
            hidden_width=config.audio_adapter.hidden_width or round_up(config.width * 16 // 3),
            rms=backbone.embedding_rms,
            config=config.audio_adapter,
        )
        self.code_embedding = CodeEmbedding(
            num_codebooks=rows,
            vocabulary=vocabulary,
            width=config.width,
            rms=backbone.embedding_rms,
            fusion=config.fusion,
        )
        self.tts_blocks = TtsBlocks(width=config.hidden_width, config=config.tts)
        self.code_heads = CodeHeads(
            width=config.hidden_width, num_codebooks=rows, vocabulary_size=vocabulary.size
        )

    @property
    def device(self) -> torch.device:
        """Where the grafted parts live; inputs go there."""
        return self.code_embedding.weight.device

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return every parameter by weight group, under its full name.

        The groups are those of ``ADDED_GROUPS``, ``lora``, ``language_model`` and ``audio_encoder``; each
        parameter is in exactly one.
        """
        found: dict[str, dict[str, nn.Parameter]] = {
            group: {} for group in (*ADDED_GROUPS, "lora", "language_model", "audio_encoder")
        }
        for name, parameter in self.named_parameters():
            found[_group_of(name)][name] = parameter
        return found

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of everything that wrapping added, without LoRA."""
        groups = self.groups()
        for group in ADDED_GROUPS:
            yield from groups[group].items()

    def checkpoint_gradients(self) -> None:
        """Compute the states of LM and TTS blocks again in backward passes instead of keeping them."""
        self.backbone.checkpoint_gradients()
        self.tts_blocks.gradient_checkpointing = True

    def hear(self, clips: Clips) -> list[Tensor]:
        """Return the embeddings of each recording, [A, D] each."""
        padding = self.config.encoder_padding
        dtype, windows = self.audio_adapter.up.weight.dtype, []
        if clips.lengths.numel():
            frames, lengths = self.audio_encoder(
                clips.features, clips.lengths, padding=padding, block_steps=self.encoder_block_steps
            )  # [W, A', E], [W]
            windows = [window[:length] for window, length in zip(frames, lengths.tolist(), strict=True)]
        recordings, steps, first = [], [], 0
        for count, cached in zip(clips.windows, clips.frames or (None,) * len(clips.windows), strict=True):
            recording = torch.cat(windows[first : first + count]) if cached is None else cached  # [A', E]
            recording = recording.to(dtype)
            steps.append(self.audio_adapter.num_steps(recording.shape[0]))
            missing = steps[-1] * self.audio_adapter.stack - recording.shape[0]
            recordings.append(F.pad(recording, (0, 0, 0, missing)))
            first += count
        # One call for all: processes that share sharded weights must call each module equally often.
        together = torch.cat(recordings)[None]
        return list(self.audio_adapter(together)[0].split(steps))

    def embed(
        self, grid: Tensor, *, places: Sequence[tuple[int, int, int]] = (), heard: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return what the LM is fed, [B, S, D].

        Args:
            grid: ids, [B, K + 1, S]; the last row is text.
            places: batch row, first step and number of steps of each recording.
            heard: embeddings of each recording, [A, D].

        Raises:
            PromptError: if a recording does not have the length of its place.
        """
        text = self.backbone.embed(grid[:, -1])  # [B, S, D]
        codes = self.code_embedding(grid[:, :-1])  # [B, S, D]
        for (row, start, length), embeddings in zip(places, heard, strict=True):
            if embeddings.shape[0] != length:
                raise PromptError(
                    f"a recording takes {embeddings.shape[0]} steps, its place in the prompt has {length}; "
                    "lay prompts out with the processor of this model"
                )
            codes[row, start : start + length] = self.code_embedding.spread(embeddings)
        return self.code_embedding.fuse(text, codes.to(text.dtype))

    def speak(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TtsCache | None = None,
        steps_to_keep: int | None = 0,
    ) -> Tensor:
        """Return code logits [B, K, S, V] of LM states [B, S, D].

        Args:
            hidden: states that enter the TTS blocks, the backbone's ``tapped``.
            attention_mask: [B, past + S], zero at padding.
            position_ids: [B, S].
            cache: keys and values of earlier steps; these steps are added to it.
            steps_to_keep: only that many last steps get logits; 0 for all, None to run no heads.
        """
        hidden = hidden.to(self.code_heads.proj.weight.dtype)
        spoken: Tensor = self.tts_blocks(
            hidden, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        )  # [B, S, D]
        if steps_to_keep is None:
            return spoken.new_empty(len(spoken), self.code_heads.num_codebooks, 0, 0)
        logits: Tensor = self.code_heads(spoken[:, -steps_to_keep:])
        return logits

    def forward(
        self,
        grid: Tensor,
        *,
        places: Sequence[tuple[int, int, int]] = (),
        clips: Clips | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: OmniCache | None = None,
        logits_to_keep: int = 0,
    ) -> OmniOutput:
        """Run LM, TTS blocks and all heads once.

        Args:
            grid: ids, int64 [B, K + 1, S]; the last row is text.
            places: batch row, first step and number of steps of each recording.
            clips: the recordings.
            attention_mask: [B, past + S], zero at padding; None if there is none.
            position_ids: [B, S]; None counts from the first step.
            cache: state of earlier steps, changed in place; None to run without.
            logits_to_keep: only that many last steps get logits; 0 for all.
        """
        heard = self.hear(clips) if clips is not None else []
        embeddings = self.embed(grid, places=places, heard=heard)
        output = self.backbone(
            embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache.backbone if cache else None,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
        )
        if cache is not None:
            cache.backbone = output.cache
        code_logits = self.speak(
            output.tapped,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache.tts if cache else None,
            steps_to_keep=logits_to_keep,
        )
        return OmniOutput(output.logits, code_logits, output.hidden, cache)


def _group_of(name: str) -> str:
    """Weight group of the parameter called ``name``."""
    top = name.split(".", 1)[0]
    if top == "backbone":
        return "lora" if is_lora(name) else "language_model"
    return top
