import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omni_adapter.audio.features import LogMel
from omni_adapter.errors import AudioError, CheckpointError, ConfigError, MissingDependencyError
from omni_adapter.modules.audio_encoder import AudioEncoder, EncoderState

BINS, POSITIONS = 80, 50  # windows of one second


def whisper_config(**changes):
    sizes = {
        "num_mel_bins": BINS,
        "max_source_positions": POSITIONS,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "vocab_size": 100,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    return WhisperConfig(**sizes | changes)


def whisper_encoder(**changes):
    torch.manual_seed(0)
    encoder = WhisperEncoder(whisper_config(**changes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases start at zero, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def random_features(frames, *, batch=1, bins=BINS, seed=0):
    return torch.randn(batch, bins, frames, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    return AudioEncoder(whisper_encoder())


def test_full_window_is_transformers_own_forward(encoder):
    features = random_features(2 * POSITIONS, batch=2)
    expected = encoder.encoder(features).last_hidden_state
    for padding in ("true_length", "window"):
        out = encoder(features, torch.tensor([100, 100]), padding=padding)
        assert torch.equal(out.frames, expected)
        assert out.lengths.tolist() == [POSITIONS, POSITIONS]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 2 * POSITIONS), min_size=1, max_size=4))
def test_batch_equals_single(encoder, lengths):
    windows = [random_features(length, seed=length)[0] for length in lengths]
    padded = torch.full((len(lengths), BINS, max(lengths)), 7.0)  # what follows a window must not matter
    for row, window in enumerate(windows):
        padded[row, :, : window.shape[-1]] = window
    batch = encoder(padded, torch.tensor(lengths))
    assert batch.lengths.tolist() == [encoder.num_steps(length) for length in lengths]
    for row, window in enumerate(windows):
        single = encoder(window[None], torch.tensor([lengths[row]]))
        steps = encoder.num_steps(lengths[row])
        assert single.frames.shape == (1, steps, encoder.width)
        torch.testing.assert_close(batch.frames[row, :steps], single.frames[0], rtol=0, atol=1e-5)
        assert not batch.frames[row, steps:].any()


def test_eager_attention_masks_as_well():
    model = whisper_encoder(attn_implementation="eager")
    eager, sdpa = AudioEncoder(model), AudioEncoder(whisper_encoder())
    features, lengths = random_features(80, batch=2), torch.tensor([80, 31])
    torch.testing.assert_close(eager(features, lengths).frames, sdpa(features, lengths).frames)


def test_window_padding_hears_the_silence(encoder):
    log_mel, waveform = encoder.log_mel(), 0.1 * torch.randn(6000)
    (cut,), (full,) = (log_mel.windows(waveform, padding=padding) for padding in ("true_length", "window"))
    length = torch.tensor([full.length])
    heard = encoder(full.values[None], length, padding="window")
    expected = encoder.encoder(full.values[None]).last_hidden_state[:, : encoder.num_steps(full.length)]
    torch.testing.assert_close(heard.frames, expected)
    assert heard.lengths.tolist() == [encoder.num_steps(full.length)]
    assert not torch.allclose(encoder(cut.values[None], length).frames, expected, atol=1e-3)


def test_frozen_and_always_in_evaluation_mode(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration, WhisperEncoder])
def test_every_kind_of_folder_and_model_loads(kind, tmp_path, capfd):
    torch.manual_seed(0)
    model = kind(whisper_config()).eval()
    model.save_pretrained(tmp_path)
    loaded, taken = AudioEncoder.from_pretrained(tmp_path), AudioEncoder.from_pretrained(model)
    assert "UNEXPECTED" not in capfd.readouterr().err  # no report about the decoder, which nobody asked for
    features, lengths = random_features(63), torch.tensor([63])
    assert torch.equal(loaded(features, lengths).frames, taken(features, lengths).frames)
    assert loaded.fingerprint() == taken.fingerprint()
    assert AudioEncoder.from_pretrained(loaded) is loaded


def test_shards_load(tmp_path):
    torch.manual_seed(0)
    model = WhisperModel(whisper_config()).eval()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AudioEncoder.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.encoder.parameters(), model.encoder.parameters(), strict=True)
    )


def test_half_precision_files_are_computed_in_full(tmp_path):
    whisper_encoder().half().save_pretrained(tmp_path)
    loaded = AudioEncoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_save_and_load(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = AudioEncoder.from_pretrained(tmp_path)
    features, lengths = random_features(37), torch.tensor([37])
    assert torch.equal(loaded(features, lengths).frames, encoder(features, lengths).frames)
    assert loaded.log_mel().window_frames == loaded.window_frames == 2 * POSITIONS
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_features_come_from_the_checkpoint_or_from_the_encoder(tmp_path):
    whisper_encoder(num_mel_bins=128).save_pretrained(tmp_path)
    assert AudioEncoder.from_pretrained(tmp_path).log_mel().num_mel_bins == 128
    LogMel(128, window_seconds=1, hop_length=160).save_pretrained(tmp_path)
    assert AudioEncoder.from_pretrained(tmp_path).log_mel().window_frames == 100


def test_fingerprint_tells_trainings_apart_but_not_types(encoder):
    torch.manual_seed(5)
    other = AudioEncoder(WhisperEncoder(whisper_config()))
    assert other.fingerprint() != encoder.fingerprint()
    assert AudioEncoder(whisper_encoder().bfloat16()).fingerprint() == encoder.fingerprint()


class TestWhisperPackage:
    @pytest.fixture(scope="class")
    @staticmethod
    def model():
        whisper = pytest.importorskip("whisper.model")
        torch.manual_seed(0)
        dims = whisper.ModelDimensions(
            n_mels=80,
            n_audio_ctx=1500,
            n_audio_state=64,
            n_audio_head=4,
            n_audio_layer=2,
            n_vocab=100,
            n_text_ctx=8,
            n_text_state=64,
            n_text_head=4,
            n_text_layer=1,
        )
        return whisper.Whisper(dims).eval()

    @pytest.fixture
    def checkpoint(self, model, tmp_path):
        path = tmp_path / "small.pt"
        torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, path)
        return path

    def test_features_and_frames_are_the_packages(self, model, checkpoint, monkeypatch):
        audio = pytest.importorskip("whisper.audio")
        monkeypatch.setitem(sys.modules, "whisper", None)  # a checkpoint loads without the package
        ours = AudioEncoder.from_pretrained(checkpoint)
        waveform = 0.1 * torch.randn(2 * 16000)
        mel = audio.log_mel_spectrogram(audio.pad_or_trim(waveform))
        with torch.no_grad():
            expected = model.encoder(mel[None])
        (window,) = ours.log_mel().windows(waveform, padding="window")
        torch.testing.assert_close(window.values, mel, rtol=0, atol=1e-4)
        frames = ours(window.values[None], torch.tensor([3000]), padding="window").frames
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)

    def test_by_name(self, model, monkeypatch):
        whisper = pytest.importorskip("whisper")
        monkeypatch.setattr(whisper, "load_model", lambda name, device: {"tiny": model}[name])
        assert AudioEncoder.from_pretrained("whisper:tiny").width == 64

    def test_unknown_name(self):
        pytest.importorskip("whisper")
        with pytest.raises(CheckpointError, match="cannot load 'whisper:nonsense'"):
            AudioEncoder.from_pretrained("whisper:nonsense")

    def test_package_is_optional(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "whisper", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'omni-adapter\[whisper\]'"):
            AudioEncoder.from_pretrained("whisper:tiny")

    def test_broken_checkpoints(self, model, tmp_path):
        path = tmp_path / "broken.pt"
        state = model.state_dict()
        without = {name: tensor for name, tensor in state.items() if name != "encoder.conv1.bias"}
        cases = [
            ([1, 2], "no checkpoint of the whisper package"),
            ({"dims": {"n_mels": "80"}, "model_state_dict": state}, "dims must hold whole numbers"),
            ({"dims": vars(model.dims), "model_state_dict": without}, r"missing: conv1\.bias"),
            (
                {"dims": vars(model.dims) | {"n_mels": 128}, "model_state_dict": state},
                r"conv1.weight \[64, 80, 3\] instead of \[64, 128, 3\]",
            ),
        ]
        for content, text in cases:
            torch.save(content, path)
            with pytest.raises(CheckpointError, match=text):
                AudioEncoder.from_pretrained(path)
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match="weights_only"):
            AudioEncoder.from_pretrained(path)


class TestBrokenFolders:
    @pytest.fixture
    def folder(self, encoder, tmp_path):
        encoder.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s.pop("conv1.bias"), r"missing \['conv1.bias'\]"),
            (lambda s: s.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
            (lambda s: s.update({"conv1.bias": torch.zeros(3)}), "cannot be loaded"),
            (lambda s: s["conv1.bias"].fill_(float("inf")), r"NaN or infinity in: conv1\.bias"),
        ],
    )
    def test_weights_that_do_not_fit(self, folder, change, text):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=text):
            AudioEncoder.from_pretrained(folder)

    def test_torn_weights(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="cannot be loaded from safetensors"):
            AudioEncoder.from_pretrained(folder)

    def test_pickled_weights_are_not_read(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="safetensors"):
            AudioEncoder.from_pretrained(folder)

    def test_another_kind_of_model(self, tmp_path):
        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
        )
        config.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="is a bert model; hearing needs a Whisper model"):
            AudioEncoder.from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="needs a Whisper model of transformers, got BertModel"):
            AudioEncoder.from_pretrained(BertModel(config))

    def test_nowhere(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither a folder nor a readable repository"):
            AudioEncoder.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="neither a folder nor a readable repository"):
            AudioEncoder.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("features", "lengths", "options", "text"),
    [
        (torch.zeros(1, 128, 10), [10], {}, r"features \[B, 80, F\], got \[1, 128, 10\]"),
        (torch.zeros(1, 80, 101), [101], {}, "at most 100 feature frames, got 101"),
        (torch.zeros(1, 80, 50), [50], {"padding": "window"}, "exactly 100 feature frames, got 50"),
        (torch.zeros(1, 80, 50), [51], {}, r"1 numbers from 1 to 50, got \[51\]"),
        (torch.zeros(1, 80, 50), [0], {}, "from 1 to 50"),
        (torch.zeros(2, 80, 50), [50], {}, "2 numbers"),
    ],
)
def test_features_that_do_not_fit(encoder, features, lengths, options, text):
    with pytest.raises(AudioError, match=text):
        encoder(features, torch.tensor(lengths), **options)


# --- blocks ---


def in_blocks(encoder, features, sizes, *, block_steps):
    """Frames of one window [M, F] whose features come in pieces."""
    state, parts = EncoderState(), list(features.split(sizes, dim=1))
    frames = [
        encoder.append(part, state, block_steps=block_steps, last=index + 1 == len(parts))
        for index, part in enumerate(parts)
    ]
    return torch.cat(frames)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 2 * POSITIONS), st.integers(1, 60), st.integers(1, 30))
def test_blocks_one_by_one_equal_the_whole_window(length, block_steps, piece):
    encoder = block_encoder()
    features = random_features(length, seed=length)
    whole = encoder(features, torch.tensor([length]), block_steps=block_steps).frames[0]
    frames = in_blocks(encoder, features[0], piece, block_steps=block_steps)
    torch.testing.assert_close(frames, whole, rtol=0, atol=1e-5)


@functools.cache
def block_encoder():
    return AudioEncoder(whisper_encoder())


def test_batch_equals_single_in_blocks(encoder):
    features, lengths = random_features(100, batch=2), torch.tensor([100, 37])
    batch = encoder(features, lengths, block_steps=8)
    single = encoder(features[1:, :, :37], lengths[1:], block_steps=8)
    torch.testing.assert_close(batch.frames[1, :19], single.frames[0], rtol=0, atol=1e-5)


def test_a_block_hears_what_came_before_and_nothing_else(encoder):
    features, length = random_features(100), torch.tensor([100])
    changed = features.clone()
    changed[:, :, 41:] += 1.0  # frame 40 is what the convolutions of the second block still see
    before, after = (encoder(x, length, block_steps=10).frames[0] for x in (features, changed))
    torch.testing.assert_close(after[:20], before[:20], rtol=0, atol=1e-6)
    assert not torch.allclose(after[20:30], before[20:30], atol=1e-2)
    changed = features.clone()
    changed[:, :, :10] += 1.0
    after = encoder(changed, length, block_steps=10).frames[0]
    assert not torch.allclose(after[40:], before[40:], atol=1e-3)


def test_one_block_is_the_whole_window(encoder):
    features, lengths = random_features(90, batch=2), torch.tensor([90, 31])
    expected = encoder(features, lengths).frames
    torch.testing.assert_close(
        encoder(features, lengths, block_steps=POSITIONS).frames, expected, rtol=0, atol=0
    )


def test_blocks_with_eager_attention():
    model = whisper_encoder(attn_implementation="eager")
    eager, sdpa = AudioEncoder(model), block_encoder()
    features, lengths = random_features(80, batch=2), torch.tensor([80, 31])
    torch.testing.assert_close(
        eager(features, lengths, block_steps=7).frames, sdpa(features, lengths, block_steps=7).frames
    )
    frames = in_blocks(eager, features[0], 9, block_steps=7)
    torch.testing.assert_close(frames, sdpa(features, lengths, block_steps=7).frames[0], rtol=0, atol=1e-5)


def test_a_block_is_encoded_when_one_frame_more_is_there(encoder):
    state = EncoderState()
    features = random_features(21)[0]
    assert encoder.append(features[:, :20], state, block_steps=10).shape == (0, encoder.width)
    assert encoder.append(features[:, 20:], state, block_steps=10).shape == (10, encoder.width)
    assert state.steps == 10


def test_looking_ahead_comes_nearer_to_the_whole_window(encoder):
    features, length = random_features(100), torch.tensor([100])
    whole = encoder(features, length).frames[0]
    errors = []
    for lookahead_steps in (0, 10, 20, 45):
        state = EncoderState()
        frames = [
            encoder.append(part, state, block_steps=5, lookahead_steps=lookahead_steps)
            for start, part in zip(range(0, 100, 7), features[0].split(7, dim=1), strict=False)
        ]
        last = encoder.append(
            features[0, :, :0], state, block_steps=5, lookahead_steps=lookahead_steps, last=True
        )
        frames = torch.cat([*frames, last])
        assert frames.shape == whole.shape
        assert state.steps == POSITIONS
        errors.append(float((frames - whole).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4  # it looks as far as the window goes


def test_length_of_a_block(encoder):
    assert encoder.block_steps(None) is None
    assert encoder.block_steps(0.5) == 25
    with pytest.raises(ConfigError, match=r"multiple of the encoder's 0\.02 s a frame, got 0\.05; try 0\.04"):
        encoder.block_steps(0.05)
    with pytest.raises(ConfigError, match=r"got 0\.001; try 0\.02"):
        encoder.block_steps(0.001)


def test_errors_of_features_that_grow(encoder):
    with pytest.raises(AudioError, match=r"takes features \[80, f\], got \[79, 4\]"):
        encoder.append(torch.zeros(79, 4), EncoderState(), block_steps=5)
    state = EncoderState()
    encoder.append(torch.zeros(BINS, 2 * POSITIONS), state, block_steps=5, last=True)
    with pytest.raises(AudioError, match=r"at most 100 feature frames, got 101; begin a new state"):
        encoder.append(torch.zeros(BINS, 1), state, block_steps=5)
