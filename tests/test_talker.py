import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.untrained_talker import make_parts
from omni_adapter import (
    CheckpointError,
    ConfigError,
    GenerationSettings,
    OmniAdapter,
    PromptError,
    Reply,
    SamplingSettings,
    SnacCodec,
)
from omni_adapter.audio.delay import UndelayState, undelay_chunk
from omni_adapter.data.layout import get_task
from omni_adapter.generation.generator import Decoder
from tests.talkers import fresh_talker

SHORT = {"max_new_tokens": 30}


def frames_of(talker, path) -> torch.Tensor:
    """Codes [K, T] of the reply to a recording."""
    rules = talker.processor.rules
    sample = talker.processor(
        [{"role": "user", "content": [{"type": "audio", "audio": path}]}], task="speech_to_speech"
    )
    decoder = Decoder(
        talker.model,
        rules=rules,
        task=get_task("speech_to_speech"),
        text_end_ids=talker.config.text_end_ids,
        settings=GenerationSettings(**SHORT),
    )
    delayed = torch.stack([step.codes[0] for step in decoder.run([sample])], dim=-1)[None]
    return undelay_chunk(delayed, UndelayState(), delays=rules.delays, end=rules.vocabulary.end)[0]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 1000])
def test_streamed_sound_equals_whole_decoding(talker, question, stride):
    chunks = list(talker.stream(question, stride=stride, **SHORT))
    streamed = np.concatenate([chunk.audio for chunk in chunks])
    whole = talker.codec.decode(frames_of(talker, question)[None])[0].numpy()
    assert len(whole) == frames_of(talker, question).shape[1] * talker.codec.spec.samples_per_frame > 0
    np.testing.assert_array_equal(streamed, whole)


def test_sound_comes_before_the_reply_is_over(talker, question):
    chunks = list(talker.stream(question, **SHORT))
    first = next(index for index, chunk in enumerate(chunks) if len(chunk.audio))
    assert first < len(chunks) - 2
    # the first frame is complete after 8 steps; its first sound is final once two more frames are known
    assert chunks[first].step == 9
    assert [chunk.elapsed_s for chunk in chunks] == sorted(chunk.elapsed_s for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize(("frames", "step"), [(0, 7), (1, 8), (5, 9)])
def test_less_lookahead_is_heard_sooner(talker, question, frames, step):
    chunks = list(talker.stream(question, lookahead_frames=frames, **SHORT))
    assert next(chunk.step for chunk in chunks if len(chunk.audio)) == step
    assert sum(len(chunk.audio) for chunk in chunks) == len(talker.chat(question, **SHORT).audio)


def test_chat_collects_the_stream(talker, question):
    reply, chunks = talker.chat(question, **SHORT), list(talker.stream(question, **SHORT))
    assert isinstance(reply, Reply)
    assert reply.text == "".join(chunk.text for chunk in chunks)
    np.testing.assert_array_equal(reply.audio, np.concatenate([chunk.audio for chunk in chunks]))
    assert reply.audio.dtype == np.float32
    assert np.abs(reply.audio).max() <= 1
    assert reply.sampling_rate == 24000
    assert reply.steps == 30
    assert reply.finish_reason == "length"
    assert reply.first_text_s <= reply.first_audio_s <= reply.elapsed_s
    assert reply.real_time_factor == pytest.approx(reply.elapsed_s / (len(reply.audio) / 24000))


def test_text_of_a_spoken_reply_is_that_of_a_written_one(talker, question):
    assert talker.chat(question, **SHORT).text == talker.chat(question, speak=False, **SHORT).text


def test_written_replies_are_silent(talker, question):
    reply = talker.chat(question, speak=False, **SHORT)
    assert len(reply.audio) == 0
    assert reply.real_time_factor is None
    assert reply.text


def test_text_path_is_the_base_bit_for_bit(talker):
    base, processor = talker.model.backbone.lm, talker.processor
    sample = processor([{"role": "user", "content": "How are you today?"}], task="text_to_text")
    ids = sample.layout.grid[None, -1]
    with torch.no_grad():
        assert torch.equal(talker.model(sample.layout.grid[None]).text_logits, base(ids).logits)


def test_greedy_text_is_the_base(talker):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Tell me a story"}]
    tokenizer = talker.tokenizer
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = talker.model.backbone.lm.generate(**encoded, max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert talker.chat(messages=messages, speak=False, max_new_tokens=40).text == expected


def test_say_reads_the_text_word_for_word(talker):
    reply = talker.say("Once there was a small boat.", **SHORT)
    assert reply.text == "Once there was a small boat."
    assert len(reply.audio)


def test_transcribe_writes_and_does_not_speak(talker, question):
    reply = talker.transcribe(question, **SHORT)
    assert reply.text
    assert len(reply.audio) == 0
    assert reply.text != talker.chat(question, speak=False, **SHORT).text  # the mark tells the tasks apart


def test_many_conversations_at_once(talker, speak):
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": speak(text)}]}]
        for text in ("Hi", "How are you?")
    ]
    replies = talker.chat_many(conversations, **SHORT)
    for conversation, reply in zip(conversations, replies, strict=True):
        alone = talker.chat(messages=conversation, **SHORT)
        assert reply.text == alone.text
        np.testing.assert_array_equal(reply.audio, alone.audio)


def test_several_turns_with_speech_and_text(talker, question, speak):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "audio", "audio": question}]},
        {"role": "assistant", "content": "Paris."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And now: "},
                {"type": "audio", "audio": speak("Tell me a story")},
            ],
        },
    ]
    reply = talker.chat(messages=messages, **SHORT)
    assert reply.text
    assert reply.text != talker.chat(messages=messages[-1:], **SHORT).text


def test_draws_are_seeded(talker):
    sampling = {
        "text_sampling": SamplingSettings(do_sample=True, temperature=2.0),
        "code_sampling": SamplingSettings(do_sample=True),
    }
    first, same, other = (talker.chat(text="Yes", seed=seed, **sampling, **SHORT) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.audio, same.audio)
    assert first.text == same.text
    assert not np.array_equal(first.audio, other.audio)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.chat(), PromptError, "no question; pass a recording, text= or messages="),
        (lambda t: t.chat(text="a", messages=[]), PromptError, "either messages=, or audio"),
        (lambda t: t.chat(messages=[]), PromptError, "no messages; pass at least one user turn"),
        (lambda t: t.chat(messages=[{"content": "x"}]), PromptError, "needs 'role' and 'content'"),
        (lambda t: t.chat(text="a", max_new_token=3), ConfigError, "did you mean 'max_new_tokens'"),
        (lambda t: t.chat_many([]), PromptError, "no conversations"),
        (lambda t: t.say("  "), PromptError, "nothing to say: the text is empty"),
        (lambda t: t.chat_many([[{"role": "user", "content": "a"}]], task="asr"), PromptError, "'asr' hears"),
        (
            lambda t: t.chat(messages=[{"role": "user", "content": [{"type": "image"}]}]),
            PromptError,
            "a part of a message must be",
        ),
    ],
)
def test_wrong_questions_are_refused(talker, call, error, message):
    with pytest.raises(error, match=message):
        call(talker)


def test_tasks_are_not_mixed_in_one_call(talker, question):
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": question}]}],
        [{"role": "user", "content": "Hi"}],
    ]
    with pytest.raises(PromptError, match="of one call share a task, got speech_to_speech, text_to"):
        talker.chat_many(conversations)


# saving and loading


def test_wrapping_is_seeded_and_leaves_the_base_alone():
    parts = make_parts()
    before = {name: tensor.clone() for name, tensor in parts.lm.state_dict().items()}
    talker = OmniAdapter.wrap(
        parts.lm, tokenizer=parts.tokenizer, encoder=parts.whisper, codec=SnacCodec.from_model(parts.snac)
    )
    assert len(talker.model.tts_blocks.blocks) == 6
    after = talker.model.backbone.lm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second, other = fresh_talker(), fresh_talker(), fresh_talker(seed=1)
    for name, tensor in first.model.added_parameters():
        assert torch.equal(tensor, dict(second.model.added_parameters())[name])
    assert not torch.equal(first.model.code_heads.proj.weight, other.model.code_heads.proj.weight)


def test_only_what_was_added_is_saved(tmp_path):
    talker = fresh_talker()
    talker.save_pretrained(tmp_path, include=("base", "encoder", "codec"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "base", "codec", "encoder", "omni_config.json", "omni_model.safetensors",
        "preprocessor_config.json",
    }  # fmt: skip
    saved = load_file(tmp_path / "omni_model.safetensors")
    assert saved.keys() == dict(talker.model.added_parameters()).keys()
    assert {name.split(".")[0] for name in saved} == {
        "audio_adapter", "code_embedding", "tts_blocks", "code_heads"
    }  # fmt: skip


def test_a_loaded_talker_says_the_same(talker, talker_folder, question):
    again = OmniAdapter.from_pretrained(talker_folder)
    first, second = talker.chat(question, **SHORT), again.chat(question, **SHORT)
    assert first.text == second.text
    np.testing.assert_array_equal(first.audio, second.audio)


def test_lora_is_saved_loaded_and_merged(tmp_path, question):
    talker = fresh_talker()
    talker.model.backbone.add_lora(4)
    for parameter in talker.model.groups()["lora"].values():
        parameter.data.normal_(std=0.3)
    plain = fresh_talker().chat(question, **SHORT)
    reply = talker.chat(question, **SHORT)
    assert reply.text != plain.text
    talker.save_pretrained(tmp_path / "lora", include=("base", "encoder", "codec"))
    loaded = OmniAdapter.from_pretrained(tmp_path / "lora")
    assert loaded.model.backbone.has_lora
    assert loaded.chat(question, **SHORT).text == reply.text
    with loaded.model.backbone.lora_disabled():
        assert loaded.chat(question, speak=False, **SHORT).text == plain.text
    talker.export(tmp_path / "merged")
    merged = OmniAdapter.from_pretrained(tmp_path / "merged")
    assert not merged.model.backbone.has_lora
    assert merged.chat(question, **SHORT).text == reply.text
    assert talker.model.backbone.has_lora  # merging works on a copy


def test_parts_without_a_name_are_not_silently_lost(tmp_path):
    with pytest.raises(CheckpointError, match=r"loaded model without a name.*include=\('base',\)"):
        fresh_talker().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="can be saved are base, encoder, codec, got decoder"):
        fresh_talker().save_pretrained(tmp_path, include=("decoder",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "width": 65}, "width"),
        (lambda c: {**c, "format_version": 99}, "format_version 99, this version of omni-adapter reads 1"),
        (lambda c: {**c, "colour": 1}, "unknown key 'colour'"),
        (lambda c: {**c, "base": {**c["base"], "id": "./../../etc"}}, "is not one of base, encoder, codec"),
        (lambda c: {**c, "tts": {**c["tts"], "layers": 5}}, "missing"),
        (lambda c: {**c, "codec_spec": {**c["codec_spec"], "codebook_size": 200}}, "codec_spec is"),
    ],
)
def test_changed_configs_are_refused(talker_folder, tmp_path, change, message):
    folder = copy_of(talker_folder, tmp_path)
    path = folder / "omni_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        OmniAdapter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "extra": torch.zeros(1)}, "extra"),
        (lambda w: {k: v for k, v in w.items() if k != "code_heads.proj.weight"}, "code_heads.proj.weight"),
        (lambda w: {**w, "code_heads.proj.weight": torch.zeros(3, 3)}, r"code_heads.proj.weight.*3, 3"),
        (lambda w: {**w, "code_heads.proj.weight": w["code_heads.proj.weight"] * torch.nan}, "NaN or inf"),
    ],
)
def test_changed_weights_are_refused(talker_folder, tmp_path, change, message):
    folder = copy_of(talker_folder, tmp_path)
    path = folder / "omni_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckpointError, match=message):
        OmniAdapter.from_pretrained(folder)


def test_another_base_is_refused_with_both_values(talker_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    parts = make_parts()
    config = LlamaConfig(**{**parts.lm.config.to_dict(), "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="num_hidden_layers was 2, is 1"):
        OmniAdapter.from_pretrained(talker_folder, base=LlamaForCausalLM(config), tokenizer=parts.tokenizer)
    parts.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(CheckpointError, match="chat_template_sha256 was"):
        OmniAdapter.from_pretrained(talker_folder, base=parts.lm, tokenizer=parts.tokenizer)


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no omni_config\.json, so no talker was saved there"):
        OmniAdapter.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist: there is no such folder"):
        OmniAdapter.from_pretrained(tmp_path / "nowhere")


def test_bases_load_in_other_types(talker_folder, question):
    half = OmniAdapter.from_pretrained(talker_folder, dtype="bfloat16", local_files_only=True)
    assert half.model.backbone.dtype == half.model.code_heads.proj.weight.dtype == torch.bfloat16
    assert len(half.chat(question, **SHORT).audio)
    with pytest.raises(
        ConfigError, match="from_pretrained does not know tts_layers; settings of a talker are"
    ):
        OmniAdapter.from_pretrained(talker_folder, tts_layers=3)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match=r"unknown key 'tts\.layer'; did you mean 'layers'"):
        fresh_talker(tts={"layer": 3})
    with pytest.raises(ConfigError, match="unknown key 'fusio'; did you mean 'fusion'"):
        fresh_talker(fusio="add")


def copy_of(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_after_a_warm_up_nothing_is_found_out_any_more(question):
    """What probes found is kept under the names of properties; a reply after a warm-up adds none."""
    warmed, cold = fresh_talker(), fresh_talker()
    before = set(vars(warmed.model.backbone))
    assert warmed.warm_up(seconds=0.5) > 0
    found = set(vars(warmed.model.backbone))
    assert found > before
    reply = warmed.chat(question, **SHORT)
    assert set(vars(warmed.model.backbone)) == found
    expected = cold.chat(question, **SHORT)
    assert reply.text == expected.text
    assert np.array_equal(reply.audio, expected.audio)


def test_a_talker_learns_after_it_talked(question):
    """Nothing that replies leave behind is without the bookkeeping that gradients need."""
    talker = fresh_talker()
    talker.model.backbone.add_lora(rank=2)
    talker.chat(question, **SHORT)
    sample = talker.processor([{"role": "user", "content": "How are you?"}], task="text_to_speech")
    output = talker.model.train()(sample.layout.grid[None])
    (output.text_logits.square().mean() + output.code_logits.square().mean()).backward()
    learning = [value for name, value in talker.model.named_parameters() if "lora_" in name or "tts" in name]
    assert learning
    assert all(value.grad is not None for value in learning)
    talker.model.eval()
    assert talker.chat(question, **SHORT).text == fresh_talker().chat(question, **SHORT).text
