"""The codec's training: it learns, it ends in a codec that loads, and it goes on where it stopped."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny_talker"
sys.path.insert(0, str(EXAMPLES))

import codec as codec_training  # noqa: E402

from omni_adapter.audio.codec import SnacCodec, levels_from_rows  # noqa: E402

CPU = torch.device("cpu")
MODEL = codec_training.MODEL | {
    "encoder_dim": 4,
    "encoder_rates": [16],
    "decoder_dim": 8,
    "decoder_rates": [16],
    "codebook_size": 16,
}
SETTINGS = codec_training.Settings(
    model=MODEL,
    steps={"codes": 30, "decoder": 10, "encoder": 6},
    rates={"codes": 3e-3, "decoder": 3e-3, "encoder": 3e-3},
    warmup_steps=3,
    free_steps=10,
    refresh_steps=4,
    mel_batch=4,
    mel_crop=16,
    batch_size=2,
    crop=32,
    validation_files=1,
    compile=False,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A world with three wavs of beating tones, half a second each."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "voice").mkdir()
    time = torch.arange(12_000) / 24_000
    for number in range(3):
        tones = [torch.sin(2 * math.pi * hertz * time) for hertz in (200 + 50 * number, 1000)]
        sound = 0.2 * (tones[0] + tones[1] * torch.sin(2 * math.pi * 4 * time))
        soundfile.write(folder / "voice" / f"{number}.wav", sound.numpy(), 24_000)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, SnacCodec]:
    out = tmp_path_factory.mktemp("codec") / "codec"
    return out, codec_training.train(SETTINGS, data=data, out=out, device=CPU)


def make_trainer(data: Path, settings: codec_training.Settings = SETTINGS) -> codec_training.Trainer:
    return codec_training.Trainer(settings, *codec_training.read_speech(data / "voice", settings), CPU)


def measure(trainer: codec_training.Trainer, part: str) -> dict:
    """What ``validate`` says after the last step of a part."""
    parts = codec_training.PARTS[: codec_training.PARTS.index(part) + 1]
    trainer.step = sum(SETTINGS.steps[part] for part in parts)
    return trainer.validate()


def test_every_part_learns(data, trained):
    out, _ = trained
    untrained, after = make_trainer(data), make_trainer(data)
    after.load(codec_training.state_path(out))
    assert after.step == after.num_steps
    assert measure(after, "codes")["mel"][-1] < 0.8 * measure(untrained, "codes")["mel"][-1]
    assert measure(after, "decoder")["validation"] < 0.8 * measure(untrained, "decoder")["validation"]


def test_the_encoder_learns_the_codes(data, trained):
    trainer = make_trainer(data, replace(SETTINGS, steps=SETTINGS.steps | {"encoder": 1_000}))
    trainer.load(codec_training.state_path(trained[0]))
    trainer.step -= SETTINGS.steps["encoder"]
    trainer.model.encoder.load_state_dict(make_trainer(data).model.encoder.state_dict())
    losses = [trainer.train_step() for _ in range(50)]
    first, last = (
        sum(sum(row[f"codes{i}"] for i in range(3)) for row in part) for part in (losses[:5], losses[-5:])
    )
    assert last < 0.95 * first


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_codes_stay_as_they_are_in_later_parts(data, part):
    trainer = make_trainer(data)
    trainer.step = SETTINGS.steps["codes"] + (SETTINGS.steps["decoder"] if part == "encoder" else 0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_step()
    after = trainer.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(f"{part}.") for name in changed)


def test_spectra_of_long_sound_have_no_seams(data):
    trainer = make_trainer(data)
    torch.manual_seed(0)
    sound = torch.randn(16 * 2_500)  # more than one piece
    whole = trainer.analysis.mel(sound)
    assert whole.shape == (160, 2_500)
    torch.testing.assert_close(
        trainer.analysis.mel(sound[16 * 1_900 : 16 * 2_200])[:, 50:-50], whole[:, 1_950:2_150]
    )


def test_rows_get_the_codes_of_their_answers(data, trained):
    out, _ = trained
    trainer = codec_training.open_trainer(SETTINGS, data=data, out=out, device=CPU)
    rows = data / "rows.jsonl"
    rows.write_text("".join(f'{{"id": {i}, "audio_out": "voice/{i % 2}.wav"}}\n' for i in range(3)))
    coded = [json.loads(line) for line in codec_training.encode_rows(rows, trainer).read_text().splitlines()]
    assert [row["id"] for row in coded] == [0, 1, 2]
    sound, _ = soundfile.read(data / "voice" / "1.wav", dtype="float32")
    assert coded[1]["codes_out"] == trainer.encode(torch.from_numpy(sound)).tolist()
    assert coded[0]["codes_out"] == coded[2]["codes_out"] != coded[1]["codes_out"]


def test_the_result_is_a_codec(data, trained):
    out, _ = trained
    codec = SnacCodec.from_pretrained(out)
    sound, _ = soundfile.read(data / "voice" / "0.wav", dtype="float32")
    codes = codec.encode(torch.from_numpy(sound))
    assert codes.shape == (7, math.ceil(12_000 / 64))
    assert codec.decode(codes[None]).abs().max() > 0.01


def test_quantiser_is_that_of_snac(data, trained):
    """The trainer's quantiser and SNAC's own choose the same codes, and these stand for the same latents."""
    out, codec = trained
    trainer = make_trainer(data)
    trainer.load(codec_training.state_path(out))
    with torch.no_grad():
        latents = trainer.model.encoder(trainer.validation[None, None])
        quantised = trainer._quantise(latents, free=False)
        levels = levels_from_rows(codec.encode(trainer.validation)[None], codec.spec)
        assert [codes.tolist() for codes in quantised.codes] == [level[0].tolist() for level in levels]
        from_codes = codec.model.quantizer.from_codes(levels)
    torch.testing.assert_close(quantised.latents[-1], from_codes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop", [5, 20, 35, 43], ids=["without codes", "codes", "decoder", "encoder"])
def test_goes_on_where_it_stopped(data, trained, tmp_path, stop):
    out = tmp_path / "codec"
    trainer = make_trainer(data)
    for _ in range(stop):
        trainer.train_step()
    trainer.save(codec_training.state_path(out))
    resumed = make_trainer(data)
    resumed.load(codec_training.state_path(out))
    assert resumed.step == stop
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    codec = codec_training.train(SETTINGS, data=data, out=out, device=CPU)
    whole = trained[1].state_dict()
    for name, tensor in codec.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], msg=name)


def test_unused_codes_are_moved(data):
    trainer = make_trainer(data)
    vectors = torch.nn.functional.normalize(torch.randn(64, 8), dim=1)
    for _ in range(40):
        trainer._follow(0, vectors, torch.zeros(64, dtype=torch.long))
    codebook = trainer._quantizers[0].codebook.weight
    assert ((codebook[1:] @ vectors.T).amax(dim=1) > 0.999).all()
    mean = torch.nn.functional.normalize(vectors.mean(dim=0), dim=0)
    assert codebook[0] @ mean > 0.99


def test_data_that_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="write them first: python examples/tiny_talker/build_world"):
        codec_training.read_speech(tmp_path, SETTINGS)


def test_data_that_is_too_short(data):
    with pytest.raises(SystemExit, match="too few for a crop"):
        codec_training.read_speech(data / "voice", replace(SETTINGS, crop=10**6))
