from dataclasses import replace

import pytest
import torch

from omni_adapter import ConfigError, OmniAdapter, PromptError
from omni_adapter.data.collator import collate
from omni_adapter.data.layout import Answer
from omni_adapter.model import ADDED_GROUPS, OmniCache, OmniModel
from tests.talkers import fresh_talker

MARKS = {"end": 300, "pad": 301, "input": 302, "answer": 303, "asr": 304}


def batch_of(talker, question, task="speech_to_speech", answer=None):
    messages = [{"role": "user", "content": [{"type": "audio", "audio": question}]}]
    return collate([talker.processor(messages, task=task, answer=answer)], rules=talker.processor.rules)


@torch.no_grad()
def test_embeddings_of_a_prompt_written_out_by_hand(talker, question):
    """Fusion add: text at full weight, codes on top, recordings in their place."""
    model, batch = talker.model, batch_of(talker, question)
    heard = model.hear(batch.clips)
    embeddings = model.embed(batch.grid, places=batch.places, heard=heard)
    (row, start, length) = batch.places[0]
    assert torch.equal(embeddings[row, start : start + length], heard[0])
    table, size = model.code_embedding.weight, talker.config.vocabulary.size
    for step in (0, 3, start - 1, start + length, embeddings.shape[1] - 1):
        text, codes = int(batch.grid[0, -1, step]), batch.grid[0, :-1, step].tolist()
        expected = torch.zeros(embeddings.shape[-1])
        if text >= 0:
            expected += model.backbone.lm.get_input_embeddings().weight[text]
        if codes[0] != talker.config.vocabulary.pad:
            expected += sum(table[k * size + code] for k, code in enumerate(codes))
        torch.testing.assert_close(embeddings[0, step], expected)


@torch.no_grad()
def test_embeddings_of_the_original_written_out_by_hand(question):
    """Fusion mean: the mean of all streams, with recordings in each of the code rows."""
    talker = fresh_talker(fusion="mean", prompt_format="mini_omni", text_marks=MARKS)
    model, batch = talker.model, batch_of(talker, question)
    heard = model.hear(batch.clips)
    embeddings = model.embed(batch.grid, places=batch.places, heard=heard)
    (_, start, length) = batch.places[0]
    table, size = model.code_embedding.weight, talker.config.vocabulary.size
    words = model.backbone.lm.get_input_embeddings().weight
    assert batch.grid[0, -1].tolist() == [302, *[301] * length, 300, 303]
    for step in (0, start, start + length - 1, start + length, start + length + 1):
        streams = [words[int(batch.grid[0, -1, step])]]
        if start <= step < start + length:
            streams += [heard[0][step - start]] * 7
        else:
            streams += [table[k * size + int(code)] for k, code in enumerate(batch.grid[0, :-1, step])]
        torch.testing.assert_close(embeddings[0, step], torch.stack(streams).mean(0))


def test_the_original_format_speaks_too(question):
    talker = fresh_talker(fusion="mean", prompt_format="mini_omni", text_marks=MARKS)
    reply = talker.chat(question, max_new_tokens=20)
    assert reply.steps
    assert talker.transcribe(question, max_new_tokens=10).steps


@pytest.mark.parametrize("delay", [{"text_lead": 3}, {"text_lead": 0, "row_delays": [0] * 7}])
def test_other_delays_speak_and_are_saved(delay, question, tmp_path):
    talker = fresh_talker(delay=delay)
    talker.save_pretrained(tmp_path, include=("base", "encoder", "codec"))
    again = OmniAdapter.from_pretrained(tmp_path)
    assert again.config.delays == talker.config.delays
    assert again.chat(question, max_new_tokens=20).text == talker.chat(question, max_new_tokens=20).text


@torch.no_grad()
def test_cached_equals_whole(talker, question):
    answer = Answer((5, 6, 7), torch.randint(0, 64, (7, 5), generator=torch.Generator().manual_seed(0)))
    batch = batch_of(talker, question, answer=answer)
    whole = talker.model(batch.grid, places=batch.places, clips=batch.clips)
    start = batch.places[0].start + batch.places[0].length + 1
    cache = OmniCache()
    parts = [talker.model(batch.grid[..., :start], places=batch.places, clips=batch.clips, cache=cache)]
    parts += [talker.model(column, cache=cache) for column in batch.grid[..., start:].split(1, dim=-1)]
    torch.testing.assert_close(torch.cat([p.text_logits for p in parts], dim=1), whole.text_logits)
    torch.testing.assert_close(torch.cat([p.code_logits for p in parts], dim=2), whole.code_logits)


@torch.no_grad()
def test_only_the_last_logits_are_made_if_only_they_are_asked_for(talker, question):
    batch = batch_of(talker, question)
    whole = talker.model(batch.grid, places=batch.places, clips=batch.clips)
    last = talker.model(batch.grid, places=batch.places, clips=batch.clips, logits_to_keep=1)
    torch.testing.assert_close(last.text_logits, whole.text_logits[:, -1:])
    torch.testing.assert_close(last.code_logits, whole.code_logits[:, :, -1:])
    assert torch.equal(last.hidden, whole.hidden)


def test_every_parameter_is_in_one_group():
    talker = fresh_talker()
    talker.model.backbone.add_lora(2)
    groups = talker.model.groups()
    assert set(groups) == {*ADDED_GROUPS, "lora", "language_model", "audio_encoder"}
    assert all(groups.values())
    named = [name for members in groups.values() for name in members]
    assert sorted(named) == sorted(name for name, _ in talker.model.named_parameters())


def test_a_place_of_another_length_is_refused(talker, question):
    batch = batch_of(talker, question)
    place = batch.places[0]._replace(length=3)
    with pytest.raises(PromptError, match=r"a recording takes \d+ steps, its place in the prompt has 3"):
        talker.model(batch.grid, places=[place], clips=batch.clips)


@pytest.mark.parametrize("name", ["width", "hidden_width", "encoder_width"])
def test_parts_of_another_width_are_refused(talker, name):
    config = replace(talker.config, **{name: 48})
    with pytest.raises(ConfigError, match=f"{name} is 48 in the config, but the part at hand has"):
        OmniModel(talker.model.backbone, talker.model.audio_encoder, config=config)


@torch.no_grad()
def test_long_recordings_are_heard_to_the_end(question):
    """Ten minutes take twenty windows of the encoder; the last second still changes what is heard."""
    talker = fresh_talker(audio_adapter={"stack": 16})
    rate = talker.processor.log_mel.sampling_rate
    sound = torch.randn(600 * rate, generator=torch.Generator().manual_seed(0)) * 0.1
    changed = sound.clone()
    changed[-rate:] *= 0.1
    heard = [talker.model.hear(batch_of(talker, (part, rate), "asr").clips)[0] for part in (sound, changed)]
    assert len(heard[0]) == 600 * 50 / 16 == talker.processor.num_steps(len(sound))
    assert torch.equal(heard[0][:1780], heard[1][:1780])
    assert not torch.equal(heard[0][-1], heard[1][-1])
    assert talker.transcribe((sound, rate), max_new_tokens=5).steps


def test_recordings_beyond_the_positions_are_refused(talker):
    rate = talker.processor.log_mel.sampling_rate
    with pytest.raises(
        PromptError, match=r"takes 300\d\d steps and the base LM knows 2048.*larger audio_adapter"
    ):
        talker.transcribe((torch.randn(600 * rate) * 0.1, rate))
