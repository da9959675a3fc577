"""Every number that is saved with a checkpoint, as frozen dataclasses that check themselves.

JSON in, dataclasses out, and back; unknown keys are errors. Knows nothing of torch, models or files.
"""

import difflib
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from omni_adapter.errors import ConfigError
from omni_adapter.vocab import CodeVocabulary, TextMarks

FORMAT_VERSION = 1

Json = str | int | float | bool | None | list[Any] | dict[str, Any]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fusion = Literal["add", "mean"]
PromptFormat = Literal["chat", "mini_omni", "slam_omni"]
EncoderPadding = Literal["true_length", "window", "whole_window", "mini_omni"]
Activation = Literal["swiglu", "relu", "gelu", "silu"]
AdapterNorm = Literal["in", "hidden", "out"]
TtsInit = Literal["identity", "scaled"]
TtsInput = Literal["after_norm", "before_norm"]
CodeRule = Literal["delayed", "free"]

_STRICT = ConfigDict(extra="forbid", strict=False)
T = TypeVar("T")


@dataclass(frozen=True, config=_STRICT)
class PartRef:
    """A part that is named instead of saved: the base LM, the audio encoder, the codec.

    Args:
        id: Hub id, folder, or ``./name`` for a folder inside the checkpoint.
        revision: commit of the Hub repository that was used, if known.
        fingerprint: facts of the part's config and tokenizer that must be the same when the checkpoint is
            loaded.
        origin: where a part inside the checkpoint came from, if known: its ``id`` before it was saved there.
        license: licence that the part's own card states.
    """

    id: str
    revision: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None
    license: str | None = None


@dataclass(frozen=True, config=_STRICT)
class CodecSpec:
    """Geometry of a codec: all that the rest of the library knows of one.

    Args:
        sampling_rate: samples a second of the waveform, Hz.
        hop_length: samples per code of the finest level.
        level_strides: codes of the finest level that one code of each level spans, coarsest first.
        codebook_size: entries of each codebook.
    """

    sampling_rate: Positive
    hop_length: Positive
    level_strides: tuple[Positive, ...]
    codebook_size: Positive

    def __post_init__(self) -> None:
        coarsest = max(self.level_strides, default=0)
        if not self.level_strides or any(coarsest % stride for stride in self.level_strides):
            raise ValueError(f"level_strides must divide the coarsest one, got {self.level_strides}")

    @property
    def num_codebooks(self) -> int:
        """Rows K of the code grid: codes of every level that fall into one frame."""
        return sum(max(self.level_strides) // stride for stride in self.level_strides)

    @property
    def samples_per_frame(self) -> int:
        """Samples that one column of the code grid decodes to."""
        return self.hop_length * max(self.level_strides)

    @property
    def frame_rate_hz(self) -> float:
        """Columns of the code grid a second."""
        return self.sampling_rate / self.samples_per_frame


SNAC_24KHZ = CodecSpec(sampling_rate=24_000, hop_length=512, level_strides=(4, 2, 1), codebook_size=4096)
"""Geometry of the published SNAC for 24 kHz, the codec of the paper."""


@dataclass(frozen=True, config=_STRICT)
class AudioAdapterConfig:
    """What takes encoder frames to the LM's width; by default the SwiGLU of Mini-Omni (its ``llamamlp``).

    Args:
        stack: encoder frames joined into one LM step; 1 is the paper's.
        hidden_width: width of its inside; None takes 16/3 of the LM's width.
        activation: ``swiglu``, with a gate; or ``relu``, ``gelu`` or ``silu``, an MLP of two layers.
        bias: give the linear layers biases.
        norms: RMS norms, on the stacked frames (``in``), inside (``hidden``), on the embeddings (``out``).
        norm_eps: epsilon of the RMS norms.
    """

    stack: Positive = 1
    hidden_width: Positive | None = None
    activation: Activation = "swiglu"
    bias: bool = False
    norms: tuple[AdapterNorm, ...] = ()
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if len(set(self.norms)) != len(self.norms):
            raise ValueError(f"norms must name each place once, got {self.norms}")


@dataclass(frozen=True, config=_STRICT)
class TtsConfig:
    """The causal transformer blocks between LM and code heads (paper, section 3: "TTS adapter").

    Args:
        layers: number of blocks, 0 for none; 6 is the paper's.
        heads: attention heads; None takes heads of width 64, or the next smaller width that divides the LM's.
        kv_heads: key/value heads; None for as many as heads.
        intermediate_width: inside of each block's SwiGLU; None takes 8/3 of the LM's width.
        rope_theta: base of the rotary position embedding.
        norm_eps: epsilon of the RMS norms.
        init: ``identity`` zeroes what each block adds, so that the heads first see the LM's own state;
            ``scaled`` draws it with the depth-scaled normal of GPT-2.
        input: the LM's state that the first block reads: ``after_norm``, what enters the LM's head; or
            ``before_norm``, what enters its final norm, as in the original.
        qkv_bias: biases on query, key and value.
    """

    layers: NotNegative = 6
    heads: Positive | None = None
    kv_heads: Positive | None = None
    intermediate_width: Positive | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init: TtsInit = "identity"
    input: TtsInput = "after_norm"
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.input == "before_norm" and not self.layers:
            raise ValueError('input="before_norm" needs layers, whose own norm the code heads read')


@dataclass(frozen=True, config=_STRICT)
class DelayConfig:
    """How far each code row lags behind the text (paper, section 3.2, figure 2).

    Args:
        text_lead: steps between a text token and the first code row.
        row_delays: further steps of each row; None for 0, 1, …, K - 1.
    """

    text_lead: NotNegative = 1
    row_delays: tuple[NotNegative, ...] | None = None

    def delays(self, num_codebooks: int) -> tuple[int, ...]:
        """Return the steps by which each of ``num_codebooks`` rows lags behind the text row.

        Raises:
            ConfigError: if ``row_delays`` does not have one entry per row.
        """
        rows = tuple(range(num_codebooks)) if self.row_delays is None else self.row_delays
        if len(rows) != num_codebooks:
            raise ConfigError(
                f"delay.row_delays needs {num_codebooks} entries, one per code row, got {len(rows)}"
            )
        return tuple(self.text_lead + delay for delay in rows)


@dataclass(frozen=True, config=_STRICT)
class OmniConfig:
    """What a saved talker is made of. ``omni_config.json`` holds exactly these keys.

    Args:
        base: the language model.
        base_adapter: an adapter of PEFT that the language model came with.
        merge_base_adapter: whether that is added to its weights; otherwise it stays beside them.
        encoder: the audio encoder.
        codec: the codec.
        codec_spec: geometry of the codec.
        width: width D of the base's embeddings.
        hidden_width: width of the states that enter the base's head; for nearly every LM the same as
            ``width``.
        encoder_width: width E of the encoder's frames.
        encoder_stride: feature frames per encoder frame.
        text_end_ids: ids that end a text answer; the first is the one that is trained on.
        fusion: ``add`` keeps the base's text path exact; ``mean`` is the original's average over all streams.
        prompt_format: ``chat`` uses the base's chat template; ``mini_omni`` the original's layouts and text
            marks; ``slam_omni`` those of SLAM-Omni in Mini-Omni mode.
        text_marks: ids of the text marks, with every ``prompt_format`` but ``chat``.
        recording_marks: with ``prompt_format="chat"``, open and close each recording by a step of its own.
        encoder_padding: ``true_length`` encodes only what was said; ``window`` pads to the encoder's full
            window and drops the silence again; ``whole_window`` keeps it; ``mini_omni`` drops it and counts
            frames as the original does, one more where a recording ends with a frame.
        encoder_block_seconds: hear in blocks of so many seconds, so that a question can be encoded while it
            is spoken: each sees itself and those before it, in training too; only with ``true_length``. None
            lets the encoder see a whole window at once, as Whisper does.
        audio_adapter: settings of the audio adapter.
        tts: settings of the TTS blocks.
        delay: the delay pattern.
        code_rule: ``delayed`` draws only ids that the delay pattern allows; ``free`` lets every code row
            write what it will until the last one writes its end, which ends the reply, as in the original.
        format_version: version of this file format.
    """

    base: PartRef
    encoder: PartRef
    codec: PartRef
    codec_spec: CodecSpec
    width: Positive
    hidden_width: Positive
    encoder_width: Positive
    encoder_stride: Positive
    text_end_ids: tuple[NotNegative, ...]
    base_adapter: PartRef | None = None
    merge_base_adapter: bool = False
    fusion: Fusion = "add"
    prompt_format: PromptFormat = "chat"
    text_marks: TextMarks | None = None
    recording_marks: bool = True
    encoder_padding: EncoderPadding = "true_length"
    encoder_block_seconds: Annotated[float, Field(gt=0)] | None = None
    audio_adapter: AudioAdapterConfig = AudioAdapterConfig()
    tts: TtsConfig = TtsConfig()
    delay: DelayConfig = DelayConfig()
    code_rule: CodeRule = "delayed"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.text_end_ids:
            raise ValueError("text_end_ids must name at least one id that ends a text answer")
        if (self.prompt_format == "chat") != (self.text_marks is None):
            raise ValueError('text_marks go with every prompt_format but "chat", and only with those')
        if self.prompt_format != "chat" and not self.recording_marks:
            raise ValueError('only prompt_format="chat" can do without recording_marks')
        if self.encoder_block_seconds is not None and self.encoder_padding != "true_length":
            raise ValueError('encoder_block_seconds goes with encoder_padding="true_length" only')
        self.delay.delays(self.codec_spec.num_codebooks)

    @property
    def vocabulary(self) -> CodeVocabulary:
        """Ids of the code rows."""
        return CodeVocabulary(self.codec_spec.codebook_size)

    @property
    def delays(self) -> tuple[int, ...]:
        """Steps by which each code row lags behind the text row, length K."""
        return self.delay.delays(self.codec_spec.num_codebooks)


def parse(kind: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build the config class ``kind`` from plain JSON or YAML values.

    Args:
        kind: a config dataclass.
        values: its keys and values.
        source: what to call the origin in an error, such as a file name.

    Raises:
        ConfigError: if a key is unknown (the nearest known one is named), missing, or has a wrong value.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = "; ".join(_describe(kind, problem) for problem in error.errors())
        raise ConfigError(f"{source}: {problems}") from None


def dump(config: Any) -> dict[str, Any]:
    """Return the plain JSON values of a config dataclass; ``parse`` restores it."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def _describe(kind: type, problem: Any) -> str:
    """One validation problem in words: where, what was expected, what came."""
    path = [str(step) for step in problem["loc"]]
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1)
        advice = f"did you mean {nearest[0]!r}?" if nearest else f"known keys are {', '.join(sorted(known))}"
        return f"unknown key {'.'.join(path)!r}; {advice}"
    return f"{'.'.join(path) or kind.__name__}: {problem['msg']}, got {problem['input']!r}"


def _known_keys(kind: Any, path: list[str]) -> list[str]:
    """Names of the fields of the dataclass found by following ``path`` from ``kind``."""
    for step in path:
        kind = kind.__dataclass_fields__[step].type
    return list(kind.__dataclass_fields__)
