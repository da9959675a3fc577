import copy
import json

import pytest
import snac
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omni_adapter.audio import snac_decoder
from omni_adapter.audio.codec import CodecStream, SnacCodec, levels_from_rows, rows_from_levels
from omni_adapter.audio.snac_decoder import DecoderState, can_join, can_round, join_states, select_states
from omni_adapter.config import CodecSpec
from omni_adapter.errors import AudioError, CheckpointError, CodeGridError, ConfigError
from omni_adapter.products import can_tile

PAPER_SPEC = CodecSpec(sampling_rate=24000, hop_length=512, level_strides=(4, 2, 1), codebook_size=4096)
# The strides of the published 24 kHz model, so its receptive field; widths and codebooks are small.
TRUE_STRIDES = {
    "sampling_rate": 24000,
    "encoder_dim": 4,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 32,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 64,
    "codebook_dim": 4,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}
OTHER_STRIDES = TRUE_STRIDES | {
    "encoder_rates": [3, 2],
    "decoder_rates": [2, 3],
    "vq_strides": [2, 1],
    "decoder_dim": 8,
    "depthwise": False,
}


def snac_model(**changes):
    torch.manual_seed(0)
    return snac.SNAC(**(TRUE_STRIDES | changes)).eval()


@torch.no_grad()
def lively(codec):
    """Random SNACs are almost silent: make every layer matter, and the output as loud as speech."""
    generator = torch.Generator().manual_seed(1)
    for parameter in codec.model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    levels = levels_from_rows(random_codes(codec, 8), codec.spec)
    loudness = codec.model.decoder.model[:-1](codec.model.quantizer.from_codes(levels)).std()
    codec.model.decoder.model[-2].weight.mul_(0.3 / loudness)
    codec.model.decoder.model[-2].bias.zero_()
    return codec


def random_codes(codec, frames, *, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, codec.spec.num_codebooks, frames)
    return torch.randint(0, codec.spec.codebook_size, shape, generator=generator)


@pytest.fixture(scope="module")
def codec():
    return lively(SnacCodec.from_model(snac_model()))


@pytest.fixture(scope="module")
def quiet_model():
    return snac_model(noise=False)


def test_row_order_is_the_papers():
    levels = [torch.tensor([[0, 1]]), torch.tensor([[10, 11, 12, 13]]), torch.arange(20, 28)[None]]
    grid = rows_from_levels(levels, PAPER_SPEC)
    assert grid[0, :, 0].tolist() == [0, 10, 20, 21, 11, 22, 23]
    assert grid[0, :, 1].tolist() == [1, 12, 24, 25, 13, 26, 27]


@settings(deadline=None)
@given(st.sampled_from([(4, 2, 1), (8, 4, 2, 1), (2, 1), (1,), (4, 1)]), st.integers(0, 5), st.integers(1, 3))
def test_levels_and_rows_are_inverse(strides, frames, batch):
    spec = CodecSpec(sampling_rate=8000, hop_length=4, level_strides=strides, codebook_size=9)
    codes = torch.randint(0, 9, (batch, spec.num_codebooks, frames))
    levels = levels_from_rows(codes, spec)
    assert [level.shape[1] for level in levels] == [frames * max(strides) // stride for stride in strides]
    assert torch.equal(rows_from_levels(levels, spec), codes)


def test_encode_and_decode_are_the_snac_packages(quiet_model):
    codec = SnacCodec.from_model(quiet_model)
    waveform = 0.3 * torch.randn(3 * codec.spec.samples_per_frame - 700)
    with torch.no_grad():
        levels = quiet_model.encode(waveform[None, None])
        expected = quiet_model.decode(levels)[:, 0]
    codes = codec.encode(waveform)
    assert codes.shape == (7, 3)
    assert codes.dtype == torch.long
    assert torch.equal(codes, rows_from_levels(levels, codec.spec)[0])
    assert all(
        torch.equal(a, b) for a, b in zip(levels, levels_from_rows(codes[None], codec.spec), strict=True)
    )
    decoded = codec.decode(codes[None])
    assert decoded.shape == (1, 3 * codec.spec.samples_per_frame)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("settings", [TRUE_STRIDES, OTHER_STRIDES])
def test_layer_by_layer_is_the_whole_decoder_in_double_precision(settings, depthwise, monkeypatch):
    model = snac_model(**settings | {"noise": False, "depthwise": depthwise})
    codec = lively(SnacCodec.from_model(model)).double()
    codes = random_codes(codec, 9, batch=2)

    def package():
        with torch.no_grad():
            return codec.model.decode(levels_from_rows(codes, codec.spec))[:, 0]

    decoded = codec.decode(codes)
    assert decoded.abs().max() > 0.1
    torch.testing.assert_close(decoded, package(), rtol=0, atol=1e-7)
    # The package adds 1e-9 to alpha before it divides by it; without that, nothing differs.
    monkeypatch.setattr(snac.layers, "snake", lambda x, alpha: x + (alpha * x).sin().square() / alpha)
    torch.testing.assert_close(decoded, package(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
def test_streamed_equals_whole_bit_for_bit(codec, chunk):
    codes = random_codes(codec, 11)
    whole = codec.decode(codes, seed=3)[0]
    stream = CodecStream(codec, seed=3)
    parts = [stream.push(part) for part in codes[0].split(chunk, dim=-1)] + [stream.finish()]
    assert torch.equal(torch.cat(parts), whole)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(0, 9))
def test_streamed_equals_whole_for_any_chunking(sizes, seed):
    codec = lively(SnacCodec.from_model(snac_model(**OTHER_STRIDES)))
    codes = random_codes(codec, sum(sizes), seed=seed)
    stream = CodecStream(codec, seed=seed)
    parts = [stream.push(part) for part in codes[0].split(sizes, dim=-1)] + [stream.finish()]
    assert torch.equal(torch.cat(parts), codec.decode(codes, seed=seed)[0])


def test_a_stream_holds_back_only_what_can_still_change(codec):
    codes, stream = random_codes(codec, 8)[0], CodecStream(codec)
    given_out, counts = 0, []
    for frame in codes.split(1, dim=-1):
        given_out += len(stream.push(frame))
        counts.append(given_out)
    frame, look_ahead = codec.spec.samples_per_frame, codec.context_samples[1]
    assert counts == [max(0, frame * (n + 1) - look_ahead) for n in range(8)]
    assert given_out + len(stream.finish()) == 8 * frame


def streamed(codec, codes, *, chunk=1, **options):
    """Chunks of one conversation's codes [K, T], the last from ``finish``."""
    stream = CodecStream(codec, **options)
    return [stream.push(part) for part in codes.split(chunk, dim=-1)] + [stream.finish()]


def signal_to_error(samples, expected):
    """Decibels."""
    return float(10 * torch.log10(expected.square().sum() / (samples - expected).square().sum()))


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_less_lookahead_comes_sooner_and_is_as_long(codec, lookahead, chunk):
    codes, frame = random_codes(codec, 8)[0], codec.spec.samples_per_frame
    parts = streamed(codec, codes, chunk=chunk, lookahead_frames=lookahead)
    known = [min(8, chunk * (place + 1)) for place in range(len(parts) - 1)]
    final = [max(0, frame * frames - codec.context_samples[1]) for frames in known]
    assert torch.tensor([len(part) for part in parts[:-1]]).cumsum(0).tolist() == [
        max(sure, frame * max(0, frames - lookahead)) for frames, sure in zip(known, final, strict=True)
    ]
    assert sum(len(part) for part in parts) == 8 * frame


def test_the_error_of_less_lookahead_is_as_stated(codec):
    codes = random_codes(codec, 12)
    whole = codec.decode(codes)[0]
    ratios = [
        signal_to_error(torch.cat(streamed(codec, codes[0], lookahead_frames=frames)), whole)
        for frames in (0, 1, 2)
    ]
    assert ratios[0] > 3
    assert ratios[1] > 12
    assert ratios[2] > 40
    assert torch.equal(torch.cat(streamed(codec, codes[0], lookahead_frames=3)), whole)


def test_what_was_given_out_early_leaves_no_trace(codec):
    """The last samples of a stream come after all guesses, and from no guess."""
    codes, frame = random_codes(codec, 9), codec.spec.samples_per_frame
    early = torch.cat(streamed(codec, codes[0], lookahead_frames=1))
    assert torch.equal(early[-frame:], codec.decode(codes)[0, -frame:])


def test_lookahead_is_no_negative_number(codec):
    with pytest.raises(ConfigError, match="lookahead_frames must be at least 0, or None, got -1"):
        CodecStream(codec, lookahead_frames=-1)


def after(codec, codes, **options):
    """State of one conversation after its codes [K, n], and its samples [m]."""
    state = codec.start(**options)
    return state, codec.decode_chunk(codes[None], state)[0]


def test_streams_that_join_are_as_if_alone(codec):
    codes = random_codes(codec, 14, batch=3)
    first, samples_of_first = after(codec, codes[0, :, :10], seed=5)
    second, samples_of_second = after(codec, codes[1, :, :4], seed=6)
    joined = join_states([first, second])
    both = codec.decode_chunk(torch.stack((codes[0, :, 10:12], codes[1, :, 4:6])), joined)
    third, samples_of_third = after(codec, codes[2, :, :3], seed=7, first_frame=2)
    joined = join_states([third, select_states(joined, [1])])  # the first goes
    rest = codec.decode_chunk(torch.stack((codes[2, :, 3:8], codes[1, :, 6:11])), joined, last=True)
    for samples, alone in (
        (torch.cat((samples_of_first, both[0])), codec.decode(codes[:1, :, :12], seed=5)[0]),
        (torch.cat((samples_of_second, both[1], rest[1])), codec.decode(codes[1:2, :, :11], seed=6)[0]),
        (torch.cat((samples_of_third, rest[0])), codec.decode(codes[2:, :, :8], seed=7, first_frame=2)[0]),
    ):
        # Products of other numbers of rows; how their sums are ordered is the processor's.
        torch.testing.assert_close(samples, alone[: len(samples)], rtol=0, atol=4e-6)


def test_joining_leaves_its_streams_as_they_were(codec):
    codes = random_codes(codec, 6)
    state, _ = after(codec, codes[0, :, :4])
    other, _ = after(codec, codes[0, :, :5])
    before = {name: held.clone() for name, held in state.buffers.items()}
    codec.decode_chunk(codes[..., 4:].expand(2, -1, -1), join_states([state, other]), last=True)
    assert state.num_frames == 4
    assert not state.finished
    assert all(torch.equal(held, before[name]) for name, held in state.buffers.items())


def test_a_stream_in_its_first_frames_cannot_join_an_older_one(codec):
    codes = random_codes(codec, 6)[0]
    young, _ = after(codec, codes[:, :1])
    old, _ = after(codec, codes)
    assert not can_join(old, young)
    assert can_join(young, after(codec, codes[:, 2:3])[0])
    with pytest.raises(CodeGridError, match="stream 1 holds back another number of samples after 1 frames"):
        join_states([old, young])


def test_a_state_can_be_copied(codec):
    codes = random_codes(codec, 6)
    state, _ = after(codec, codes[0, :, :4])
    twin = copy.deepcopy(state)
    assert isinstance(twin, DecoderState)
    expected = codec.decode_chunk(codes[..., 4:], twin, last=True)
    assert torch.equal(codec.decode_chunk(codes[..., 4:], state, last=True), expected)


@pytest.mark.skipif(can_round(torch.device("cpu")), reason="this processor multiplies bfloat16")
def test_rounded_products_are_refused_where_there_are_none():
    codec = lively(SnacCodec.from_model(snac_model()))
    codes = random_codes(codec, 4)
    before = codec.decode(codes)
    with pytest.raises(ConfigError, match="does not multiply bfloat16"):
        codec.pack("bf16")
    assert torch.equal(codec.decode(codes), before)


@pytest.mark.skipif(not can_round(torch.device("cpu")), reason="this processor does not multiply bfloat16")
def test_rounded_products_have_a_bounded_error():
    codec = lively(SnacCodec.from_model(snac_model()))
    codes = random_codes(codec, 8)
    exact = codec.decode(codes)
    codec.pack("bf16")
    rounded = codec.decode(codes)
    assert 30 < signal_to_error(rounded, exact) < 80
    assert torch.equal(torch.cat(streamed(codec, codes[0], chunk=3)), rounded[0])
    assert codec.fingerprint()["codebooks_sha256"]
    codec.pack("fp32")
    assert torch.equal(codec.decode(codes), exact)
    with pytest.raises(ConfigError, match="one of fp32, bf16, got 'int3'"):
        codec.pack("int3")


@pytest.mark.skipif(not can_tile(), reason="no C compiler here")
def test_tiles_decode_as_plain_weights_do(monkeypatch):
    codec = lively(SnacCodec.from_model(snac_model()))
    codes = random_codes(codec, 8, batch=2)
    decoded = {}
    for has_wide_vectors in (True, False):
        monkeypatch.setattr(snac_decoder, "has_vectors_of_64_bytes", lambda has=has_wide_vectors: has)
        codec.pack("fp32")
        decoded[has_wide_vectors] = codec.decode(codes)
    assert 100 < signal_to_error(decoded[False], decoded[True])
    assert torch.equal(torch.cat(streamed(codec, codes[1], chunk=3)), codec.decode(codes[1:])[0])
    monkeypatch.setattr(snac_decoder, "can_tile", lambda: False)
    codec.pack("fp32")
    assert torch.equal(codec.decode(codes), decoded[True]), "a machine without a compiler"


def test_changed_weights_are_heard():
    codec = SnacCodec.from_model(snac_model())
    codes = random_codes(codec, 3)
    before = codec.decode(codes)
    after_change = lively(codec).decode(codes)
    assert not torch.equal(before, after_change)
    assert torch.equal(after_change, SnacCodec.from_model(codec.model).decode(codes))


def test_made_in_inference_mode(codec):
    codes = random_codes(codec, 4)
    with torch.inference_mode():
        made = SnacCodec.from_model(codec.model)
        state = made.start()
        parts = [made.decode_chunk(codes[..., :2], state)]
    parts.append(made.decode_chunk(codes[..., 2:], state, last=True))
    assert torch.equal(torch.cat(parts, dim=-1), codec.decode(codes))


def test_a_snake_without_a_wave_is_the_identity():
    codec = lively(SnacCodec.from_model(snac_model(noise=False)))
    with torch.no_grad():
        for name, parameter in codec.model.decoder.named_parameters():
            if name.endswith("alpha"):
                parameter[:, ::2] = 0
    codes = random_codes(codec, 4)
    with torch.no_grad():
        expected = codec.model.decode(levels_from_rows(codes, codec.spec))[:, 0]
    torch.testing.assert_close(codec.decode(codes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [TRUE_STRIDES, OTHER_STRIDES])
def test_context_is_exactly_what_a_frame_reaches(settings):
    codec = lively(SnacCodec.from_model(snac_model(**settings))).double()
    frame, latents_per_frame = codec.spec.samples_per_frame, max(codec.spec.level_strides)
    history, look_ahead = codec.context_samples
    middle = max(codec.context_samples) // frame + 2
    latents = torch.randn(1, codec.model.latent_dim, (2 * middle + 1) * latents_per_frame, dtype=torch.double)
    latents.requires_grad_()
    own = slice(middle * latents_per_frame, (middle + 1) * latents_per_frame)
    samples = codec.model.decoder(latents)[0, 0]

    def depends_on_the_frame(sample):
        (gradient,) = torch.autograd.grad(samples[sample], latents, retain_graph=True)
        return bool(gradient[..., own].any())

    first, last = middle * frame - look_ahead, (middle + 1) * frame - 1 + history
    assert [depends_on_the_frame(first - 1), depends_on_the_frame(first)] == [False, True]
    assert [depends_on_the_frame(last), depends_on_the_frame(last + 1)] == [True, False]


@pytest.mark.parametrize("settings", [TRUE_STRIDES, OTHER_STRIDES])
def test_a_changed_frame_moves_nothing_outside_its_context(settings):
    codec = lively(SnacCodec.from_model(snac_model(**settings))).double()
    frame, (history, look_ahead) = codec.spec.samples_per_frame, codec.context_samples
    middle = max(codec.context_samples) // frame + 2
    codes = random_codes(codec, 2 * middle + 1)
    changed = codes.clone()
    changed[..., middle] = (changed[..., middle] + 1) % codec.spec.codebook_size
    moved = (codec.decode(codes) != codec.decode(changed))[0].nonzero()[:, 0]
    assert middle * frame - look_ahead <= moved[0] < middle * frame - look_ahead + frame
    assert (middle + 1) * frame - 1 + history - frame < moved[-1] <= (middle + 1) * frame - 1 + history


def test_published_strides_reach_less_than_three_frames(codec):
    assert codec.context_samples == (4757, 4757)
    assert max(codec.context_samples) < 3 * codec.spec.samples_per_frame


def test_noise_belongs_to_its_seed_and_place(codec):
    codes = random_codes(codec, 6)
    whole = codec.decode(codes, seed=1)
    assert torch.equal(whole, codec.decode(codes, seed=1))
    assert not torch.equal(whole, codec.decode(codes, seed=2))
    assert not torch.equal(whole, codec.decode(codes, seed=1, first_frame=5))


def test_a_window_with_context_gives_the_samples_of_the_whole():
    codec = lively(SnacCodec.from_model(snac_model())).double()
    codes, frame = random_codes(codec, 16), codec.spec.samples_per_frame
    whole = codec.decode(codes)
    window = codec.decode(codes[..., 4:12], first_frame=4)  # three frames of context on both sides
    torch.testing.assert_close(
        window[:, 3 * frame : 5 * frame], whole[:, 7 * frame : 9 * frame], rtol=0, atol=1e-12
    )


def test_rows_of_a_batch_have_their_own_place_in_time():
    codec = lively(SnacCodec.from_model(snac_model())).double()
    codes = random_codes(codec, 5)
    batch = codec.decode(codes.expand(2, -1, -1), first_frame=torch.tensor([0, 7]))
    for item, first_frame in enumerate((0, 7)):
        alone = codec.decode(codes, first_frame=first_frame)[0]
        torch.testing.assert_close(batch[item], alone, rtol=0, atol=1e-12)


def test_nothing_to_decode_is_silence_of_no_length(codec):
    assert codec.decode(random_codes(codec, 0, batch=2)).shape == (2, 0)
    assert CodecStream(codec).finish().shape == (0,)


def test_stays_frozen_and_in_evaluation_mode(codec):
    codec.train()
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_save_and_load(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = SnacCodec.from_pretrained(tmp_path)
    codes = random_codes(codec, 3)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    assert loaded.fingerprint() == codec.fingerprint()
    assert loaded.spec == codec.spec
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("suffixes", [None, (".weight_g", ".weight_v")])
def test_published_files_load(suffixes, tmp_path, quiet_model):
    state = quiet_model.state_dict()
    assert any(name.endswith("parametrizations.weight.original0") for name in state)
    if suffixes:
        for place, suffix in enumerate(suffixes):
            new = f".parametrizations.weight.original{place}"
            state = {name.replace(new, suffix): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(TRUE_STRIDES | {"noise": False}))
    codes = random_codes(SnacCodec.from_model(quiet_model), 2)
    with torch.no_grad():
        expected = quiet_model.decode(levels_from_rows(codes, PAPER_SPEC))[:, 0]
    torch.testing.assert_close(SnacCodec.from_pretrained(tmp_path).decode(codes), expected, rtol=0, atol=1e-6)


def test_the_model_it_was_made_from_stays_as_it_was(quiet_model):
    names = list(quiet_model.state_dict())
    codec = lively(SnacCodec.from_model(quiet_model))
    assert list(quiet_model.state_dict()) == names
    with torch.no_grad():
        quiet_model.decode(levels_from_rows(random_codes(codec, 1), codec.spec))


class TestBrokenFiles:
    @pytest.fixture
    def folder(self, codec, tmp_path):
        codec.save_pretrained(tmp_path)
        return tmp_path

    def change_weights(self, folder, change):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s.pop("decoder.model.0.bias"), "missing: decoder.model.0.bias"),
            (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
            (
                lambda s: s.update({"decoder.model.0.bias": torch.zeros(3)}),
                r"decoder.model.0.bias \[3\] instead of \[64\]",
            ),
            (
                lambda s: s["decoder.model.0.bias"].fill_(float("nan")),
                "NaN or infinity in: decoder.model.0.bias",
            ),
        ],
    )
    def test_weights_that_do_not_fit(self, folder, change, text):
        self.change_weights(folder, change)
        with pytest.raises(CheckpointError, match=text):
            SnacCodec.from_pretrained(folder)

    def test_torn_file(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            SnacCodec.from_pretrained(folder)

    def test_code_in_a_pickle_is_not_run(self, folder, tmp_path):
        marker = tmp_path / "was_run"

        class Evil:
            def __reduce__(self):
                return marker.touch, ()

        (folder / "model.safetensors").unlink()
        torch.save({"decoder.model.0.bias": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="weights_only"):
            SnacCodec.from_pretrained(folder)
        assert not marker.exists()

    def test_unknown_setting(self, folder):
        (folder / "config.json").write_text(json.dumps(TRUE_STRIDES | {"nois": True}))
        with pytest.raises(CheckpointError, match="did you mean 'noise'"):
            SnacCodec.from_pretrained(folder)

    def test_missing_files(self, folder, tmp_path):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"neither model.safetensors nor pytorch_model.bin"):
            SnacCodec.from_pretrained(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"it has no config.json"):
            SnacCodec.from_pretrained(folder)

    def test_neither_folder_nor_hub(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither a folder nor a readable repository"):
            SnacCodec.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="not on this machine"):
            SnacCodec.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


def test_attention_is_refused():
    with pytest.raises(ConfigError, match="attn_window_size null"):
        SnacCodec.from_model(snac_model(attn_window_size=32, decoder_dim=128, encoder_dim=16))


def test_grid_errors_name_the_place(codec):
    codes = random_codes(codec, 3)
    codes[0, 5, 2] = 64
    with pytest.raises(CodeGridError, match=r"row 5 holds 64 at frame 2, but codes are 0 .. 63"):
        codec.decode(codes)
    with pytest.raises(CodeGridError, match=r"integer codes \[1, 7, T\], got torch.int64 \[1, 6, 3\]"):
        codec.decode(random_codes(codec, 3)[:, :6])
    with pytest.raises(CodeGridError, match=r"got torch.float32"):
        codec.decode(random_codes(codec, 3).float())
    stream = CodecStream(codec)
    stream.finish()
    with pytest.raises(CodeGridError, match="start a new one"):
        stream.push(random_codes(codec, 1)[0])


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [
        (torch.zeros(0), "empty"),
        (torch.tensor([0.0, float("nan")]), "not_finite"),
        (torch.zeros(2, 10), "wrong_type"),
        (torch.zeros(10, dtype=torch.int16), "wrong_type"),
    ],
)
def test_what_cannot_be_encoded(codec, waveform, reason):
    with pytest.raises(AudioError) as error:
        codec.encode(waveform)
    assert error.value.reason == reason
