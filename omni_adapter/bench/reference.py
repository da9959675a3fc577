"""How the published implementation of the method decodes, restated for comparison.

A talker's sizes in, a network of the same sizes with random weights out, which hears, reads the prompt and
steps as the published code does. Nothing of it is that code: it is plain PyTorch, written from what the code
was seen to do, and kept for its cost alone. What it does on purpose, since these are the causes of its times:

- the recording is padded to the encoder's full window, 30 s, and the padding is encoded;
- two rows are decoded for a conversation, one for speech and one for text, and both run the text head and
  all code heads, one matrix, although each needs the one or the other;
- the prompt is read in both rows, which differ in its last column only, with all heads at all steps;
- keys and values lie in a cache of full length, expanded to all attention heads and zeroed for each
  conversation, and each step attends to all of it under a mask;
- ids are drawn head by head, each through top-k, a filled copy, softmax and multinomial;
- sound begins when four frames are complete, decoded without their neighbours, so that chunks do not join.

It is kinder than the original in two points: the weight norms of the codec are folded into its weights, and
features are made in the process, without a program of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.audio.codec import SnacCodec, levels_from_rows
from omni_adapter.config import CodecSpec
from omni_adapter.errors import ConfigError
from omni_adapter.modules.audio_encoder import AudioEncoder, EncodedAudio
from omni_adapter.talker import OmniAdapter

_ROWS = 2
_TEMPERATURE = 0.9
_NUMBERS = 1_000_003  # random numbers, which repeat; a prime, so that no two rows of a matrix are alike


@dataclass(frozen=True)
class ReferenceShape:
    """Sizes of the network.

    Attributes:
        layers: transformer blocks.
        width: of the states.
        heads: attention heads.
        kv_heads: key and value heads; expanded to ``heads`` in the cache.
        head_width: of each.
        inner_width: inside of the MLPs, of the audio adapter too.
        text_vocabulary: text ids.
        code_rows: code heads.
        code_vocabulary: ids of each.
        encoder_width: of the frames that are heard.
        post_layers: further blocks between the language model and the code heads.
        context_steps: length of the cache.
        rope_theta: base of the rotary positions.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner_width: int
    text_vocabulary: int
    code_rows: int
    code_vocabulary: int
    encoder_width: int
    post_layers: int
    context_steps: int
    rope_theta: float = 1_000_000.0


def shape_of(talker: OmniAdapter, *, context_steps: int, post_layers: int) -> ReferenceShape:
    """Return the sizes of a talker as the published network would have them.

    Raises:
        ConfigError: if its language model does not say them.
    """
    config = talker.model.backbone.lm.config.get_text_config()
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    missing = [key for key in keys if not isinstance(getattr(config, key, None), int)]
    if missing:
        raise ConfigError(
            f"the published network is made of blocks with attention and an MLP; the config of this language "
            f"model does not say {', '.join(missing)}, so there is nothing of its size to compare with"
        )
    heads, width = config.num_attention_heads, config.hidden_size
    vocabulary = talker.config.vocabulary
    return ReferenceShape(
        layers=config.num_hidden_layers,
        width=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        inner_width=config.intermediate_size,
        text_vocabulary=talker.model.backbone.vocab_size,
        code_rows=talker.config.codec_spec.num_codebooks,
        code_vocabulary=vocabulary.size,
        encoder_width=talker.config.encoder_width,
        post_layers=post_layers,
        context_steps=context_steps,
    )


class ReferenceBlock(nn.Module):
    """Pre-norm attention over a cache of full length, then SwiGLU."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.shape = shape
        fused = (shape.heads + 2 * shape.kv_heads) * shape.head_width
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.fused = nn.Linear(shape.width, fused, bias=True)
        self.merged = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.gate = nn.Linear(shape.width, shape.inner_width, bias=False)
        self.up = nn.Linear(shape.width, shape.inner_width, bias=False)
        self.down = nn.Linear(shape.inner_width, shape.width, bias=False)

    def forward(self, hidden: Tensor, place: "Place", keys: Tensor, values: Tensor) -> Tensor:
        """Return the block's output [B, S, D]; its keys and values are written into the cache."""
        shape = self.shape
        normed = self.attention_norm(hidden)
        query, key, value = self._project(normed)
        query, key = place.rotate(query), place.rotate(key)
        share = shape.heads // shape.kv_heads
        keys.index_copy_(2, place.positions, key.repeat_interleave(share, dim=1))
        values.index_copy_(2, place.positions, value.repeat_interleave(share, dim=1))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=place.mask)
        hidden = hidden + self.merged(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden)
        out: Tensor = hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out

    def _project(self, normed: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, [B, H, S, W] each."""
        shape = self.shape
        sizes = [count * shape.head_width for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
        parts = self.fused(normed).split(sizes, dim=-1)
        return [part.unflatten(-1, (-1, shape.head_width)).transpose(1, 2) for part in parts]


@dataclass
class Place:
    """Where the steps of a pass stand.

    Attributes:
        positions: their numbers, [S].
        mask: which place of the cache each may see, bool [1, 1, S, context].
        cosines: of the rotary positions, [S, W / 2].
        sines: likewise.
    """

    positions: Tensor
    mask: Tensor
    cosines: Tensor
    sines: Tensor

    def rotate(self, states: Tensor) -> Tensor:
        """Rotate [B, H, S, W] by position."""
        first, second = states.chunk(2, dim=-1)
        turned = (first * self.cosines - second * self.sines, second * self.cosines + first * self.sines)
        return torch.cat(turned, dim=-1)


class ReferenceModel(nn.Module):
    """The network: embeddings of all streams averaged, blocks, and all heads in one matrix."""

    def __init__(self, shape: ReferenceShape) -> None:
        super().__init__()
        self.shape = shape
        vocabulary = shape.text_vocabulary + shape.code_rows * shape.code_vocabulary
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.adapter_gate = nn.Linear(shape.encoder_width, shape.inner_width, bias=False)
        self.adapter_up = nn.Linear(shape.encoder_width, shape.inner_width, bias=False)
        self.adapter_down = nn.Linear(shape.inner_width, shape.width, bias=False)
        self.blocks = nn.ModuleList(ReferenceBlock(shape) for _ in range(shape.layers + shape.post_layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, vocabulary, bias=False)
        if shape.post_layers:
            self.post_norm = nn.RMSNorm(shape.width, eps=1e-6)
            self.post_head = nn.Linear(shape.width, shape.code_rows * shape.code_vocabulary, bias=False)
        self.make_tables(torch.device("cpu"))

    def make_tables(self, device: torch.device) -> None:
        """Make what is looked up by position: which steps each step sees, and its rotation."""
        shape = self.shape
        steps = torch.arange(shape.context_steps, device=device)
        exponents = torch.arange(0, shape.head_width, 2, device=device).float() / shape.head_width
        angles = steps[:, None] * shape.rope_theta**-exponents
        self.seen = steps[:, None] >= steps
        self.cosines, self.sines = angles.cos(), angles.sin()

    def new_cache(self, *, post: bool) -> list[tuple[Tensor, Tensor]]:
        """Zeroed keys and values of full length for every block, [2, H, context, W] each."""
        shape, like = self.shape, self.head.weight
        size = (_ROWS, shape.heads, shape.context_steps, shape.head_width)
        count = shape.layers + (shape.post_layers if post else 0)
        return [(like.new_zeros(size), like.new_zeros(size)) for _ in range(count)]

    def hear(self, frames: Tensor) -> Tensor:
        """Audio adapter: frames [A, E] of the encoder to [A, D]."""
        frames = frames.to(self.head.weight.dtype)
        heard: Tensor = self.adapter_down(F.silu(self.adapter_gate(frames)) * self.adapter_up(frames))
        return heard

    def forward(
        self,
        streams: Tensor,
        positions: Tensor,
        cache: list[tuple[Tensor, Tensor]],
        heard: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return text logits [2, S, V] and the logits of each code head, [2, S, V] each.

        Args:
            streams: joint ids, code rows first, [2, K + 1, S].
            positions: of the steps, [S].
            cache: keys and values of each block; the further blocks run if it has theirs.
            heard: what all code rows hold from the second step on, [A, D].
        """
        shape = self.shape
        embedded = self.embedding(streams)  # [2, K + 1, S, D]
        if heard is not None:
            embedded[:, :-1, 1 : 1 + len(heard)] = heard
        hidden = embedded.mean(dim=1)
        place = Place(
            positions, self.seen[positions][None, None], self.cosines[positions], self.sines[positions]
        )
        place.cosines, place.sines = place.cosines.to(hidden), place.sines.to(hidden)
        for block, (keys, values) in zip(self.blocks[: shape.layers], cache, strict=False):
            hidden = block(hidden, place, keys, values)
        logits = self.head(self.norm(hidden))
        text, codes = logits[..., : shape.text_vocabulary], logits[..., shape.text_vocabulary :]
        further = cache[shape.layers :]
        for block, (keys, values) in zip(self.blocks[shape.layers :], further, strict=False):
            hidden = block(hidden, place, keys, values)
        if further:
            codes = self.post_head(self.post_norm(hidden))
        return text, list(torch.split(codes, shape.code_vocabulary, dim=-1))

    def step_weight_bytes(self, *, post: bool) -> int:
        """Bytes of weights that every step reads."""
        read: list[nn.Module] = [*self.blocks[: self.shape.layers], self.norm, self.head]
        if post:
            read += [*self.blocks[self.shape.layers :], self.post_norm, self.post_head]
        weights = [weight for module in read for weight in module.parameters()]
        return sum(weight.numel() * weight.element_size() for weight in weights)


def random_reference(shape: ReferenceShape, *, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    """Build the network with random weights."""
    with torch.device("meta"):
        model = ReferenceModel(shape)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    numbers = ((torch.rand(_NUMBERS, generator=generator) - 0.5) / 16).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
                continue
            for part in torch.split(weight.view(-1), _NUMBERS):
                part.copy_(numbers[: len(part)])
    model.make_tables(device)
    return model.eval().requires_grad_(False)


@dataclass
class ReferenceState:
    """A conversation of the reference between steps."""

    cache: list[tuple[Tensor, Tensor]]
    position: int
    text_logits: Tensor
    code_logits: list[Tensor]
    frames: list[Tensor] = field(default_factory=list)


class ReferenceTalker:
    """Answers a recording as the published code does.

    Args:
        model: the network.
        encoder: encodes recordings, in float32.
        codec: turns codes into sound.
        stride: frames per chunk of sound.
        post: whether the further blocks before the code heads are there.
    """

    def __init__(
        self, model: ReferenceModel, *, encoder: AudioEncoder, codec: SnacCodec, stride: int, post: bool
    ) -> None:
        self.model, self.encoder, self.codec, self.stride, self.post = model, encoder, codec, stride, post
        shape = model.shape
        starts = torch.arange(shape.code_rows) * shape.code_vocabulary + shape.text_vocabulary
        self.code_starts = starts.to(model.head.weight.device)  # joint id of each row's first code

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.code_starts.device

    @property
    def first_chunk_steps(self) -> int:
        """Steps until the first chunk is complete: a frame takes one for each code row."""
        return self.model.shape.code_rows + self.stride - 1

    @torch.inference_mode()
    def encode(self, waveform: Tensor) -> Tensor:
        """Frames [A, E] of a recording [N], encoded with the silence that fills its window."""
        log_mel = self.encoder.log_mel()
        window = log_mel.windows(waveform, padding="window")[0]
        lengths = torch.tensor([window.length], device=self.device)
        features = window.values[None].to(self.device)
        encoded: EncodedAudio = self.encoder(features, lengths, padding="window")
        return encoded.frames[0]

    @torch.inference_mode()
    def begin(self, waveform: Tensor) -> ReferenceState:
        """Hear a question and read the prompt, in two rows, with all heads at all steps."""
        return self.read(self.encode(waveform))

    @torch.inference_mode()
    def read(self, frames: Tensor) -> ReferenceState:
        """Read the prompt of a recording that is encoded."""
        cache = self.model.new_cache(post=self.post)
        streams = self._prompt(len(frames))
        positions = torch.arange(streams.shape[-1], device=self.device)
        text, codes = self.model(streams, positions, cache, self.model.hear(frames))
        return ReferenceState(cache, streams.shape[-1], text, codes)

    @torch.inference_mode()
    def step(self, state: ReferenceState) -> None:
        """Draw all ids, one head after the other, and feed them."""
        shape = self.model.shape
        codes = [draw(logits[0, -1]) for logits in state.code_logits]
        text = draw(state.text_logits[1, -1])
        state.frames.append(torch.cat(codes))
        pad = self.code_starts + shape.code_vocabulary - 1
        spoken = self.code_starts + torch.cat(codes)
        delayed = torch.arange(shape.code_rows, device=self.device) >= len(state.frames)
        spoken = torch.where(delayed, pad, spoken)
        streams = torch.stack((torch.cat((spoken, text)), torch.cat((pad, text))))[..., None]  # [2, K + 1, 1]
        positions = torch.tensor([state.position], device=self.device)
        state.text_logits, state.code_logits = self.model(streams, positions, state.cache)
        state.position += 1

    @torch.inference_mode()
    def decode_chunk(self, state: ReferenceState) -> Tensor:
        """Sound of the newest ``stride`` frames alone, whose rows each lag by one step more."""
        rows = self.model.shape.code_rows
        newest = torch.stack(state.frames[-(rows + self.stride - 1) :])  # [steps, K]
        grid = torch.stack([newest[row : row + self.stride, row] for row in range(rows)])  # [K, stride]
        return self.decode(grid % self.codec.spec.codebook_size)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Sound [n] of codes [K, T], without what stands beside them."""
        return decode_alone(self.codec, codes, self.codec.spec)

    def first_audio(self, waveform: Tensor) -> Tensor:
        """Everything from a question [N] to the first sound [n]."""
        state = self.begin(waveform)
        for _ in range(self.first_chunk_steps):
            self.step(state)
        return self.decode_chunk(state)

    def _prompt(self, num_frames: int) -> Tensor:
        """Joint ids [2, K + 1, S]: a mark, the recording, two marks; the rows differ in the last column."""
        shape = self.model.shape
        pad = (self.code_starts + shape.code_vocabulary - 1)[None, :, None]
        codes = pad.repeat(_ROWS, 1, num_frames + 3)
        codes[0, :, -1] -= 1
        text = torch.full((_ROWS, 1, num_frames + 3), shape.text_vocabulary - 1, device=self.device)
        return torch.cat((codes, text), dim=1)


def draw(logits: Tensor) -> Tensor:
    """Draw one of logits [V], as an id [1]: the highest ones kept in a filled copy, softmax, multinomial."""
    values, places = torch.topk(logits, 1)
    kept = torch.full_like(logits, -torch.inf).scatter_(-1, places, values)
    return torch.multinomial(torch.softmax(kept / _TEMPERATURE, dim=-1), num_samples=1)


def decode_alone(codec: SnacCodec, codes: Tensor, spec: CodecSpec) -> Tensor:
    """Decode codes [K, T] in one go, with noise of their own, as SNAC itself does."""
    sound: Tensor = codec.model.decode(levels_from_rows(codes[None], spec))
    return sound[0, 0]
