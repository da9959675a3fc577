from dataclasses import replace

import pytest
import torch

from examples.untrained_talker import make_tokenizer
from omni_adapter.config import AudioAdapterConfig
from omni_adapter.data.layout import AudioSegment, TextSegment
from omni_adapter.data.processor import (
    BEING_SPOKEN,
    OmniProcessor,
    find_text_end_ids,
    render_chat,
    tokenizer_fingerprint,
)
from omni_adapter.errors import AudioError, PromptError
from omni_adapter.vocab import NO_TEXT, TextMarks

STRICT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
)


def with_template(talker, template: str | None) -> OmniProcessor:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return OmniProcessor(tokenizer, talker.processor.log_mel, config=talker.config)


def test_text_prompts_are_those_of_the_base(talker):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am fine."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story"}],
        },
    ]
    sample = talker.processor(messages, task="text_to_text")
    flat = [*messages[:-1], {"role": "user", "content": "Tell me a story"}]
    expected = talker.tokenizer.apply_chat_template(flat, add_generation_prompt=True)["input_ids"]
    assert sample.layout.grid[-1].tolist() == expected


def test_recordings_stand_where_they_were_put(talker, question):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Listen: "},
                {"type": "audio", "audio": question},
                {"type": "text", "text": " and answer"},
            ],
        }
    ]
    segments, waveforms = talker.processor.apply_chat_template(messages)
    before, recording, after = segments
    decode = talker.tokenizer.decode
    assert decode(before.ids) == "<|start|>user\nListen: "
    assert recording == AudioSegment(talker.processor.num_steps(waveforms[0].shape[0]))
    assert decode(after.ids) == " and answer<|end|>\n<|start|>assistant\n"
    layout = talker.processor(messages, task="speech_to_text").layout
    (span,) = layout.spans
    text = layout.grid[-1].tolist()
    assert set(text[span.start - 1 : span.start + span.length + 1]) == {NO_TEXT}
    assert NO_TEXT not in text[: span.start - 1] + text[span.start + span.length + 1 :]


@pytest.mark.parametrize("stack", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [400, 16_000, 16_001, 480_000, 480_001, 1_000_000])
def test_steps_of_a_recording_are_known_before_it_is_encoded(talker, num_samples, stack):
    import torch

    from omni_adapter.audio.clips import Clips
    from omni_adapter.modules.audio_adapter import AudioAdapter

    config = replace(talker.config, audio_adapter=AudioAdapterConfig(stack=stack))
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    windows = processor.log_mel.windows(torch.randn(num_samples) * 0.1, padding="true_length")
    clips = Clips.of([windows])
    _, lengths = talker.model.audio_encoder(clips.features, clips.lengths)
    adapter = AudioAdapter(in_width=4, out_width=4, hidden_width=4, rms=1, config=config.audio_adapter)
    assert processor.num_steps(num_samples) == adapter.num_steps(int(lengths.sum()))


def test_words_that_look_like_a_placeholder_are_just_words(talker, question):
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "<|recording|>"}, {"type": "audio", "audio": question}],
        }
    ]
    segments, _ = talker.processor.apply_chat_template(messages)
    assert [type(segment) for segment in segments] == [TextSegment, AudioSegment, TextSegment]
    assert talker.tokenizer.decode(segments[0].ids).endswith("<|recording|>")


def test_tts_reads_what_the_user_wrote_without_showing_it(talker):
    sample = talker.processor([{"role": "user", "content": "Once upon a time"}], task="tts")
    assert talker.tokenizer.decode(sample.layout.grid[-1]) == "<|start|>user\n<|end|>\n<|start|>assistant\n"


def test_bases_without_a_chat_template_get_a_plain_one(talker, question):
    processor = with_template(talker, None)
    messages = [{"role": "user", "content": [{"type": "audio", "audio": question}]}]
    segments, _ = processor.apply_chat_template(messages)
    texts = [processor.tokenizer.decode(s.ids) for s in segments if isinstance(s, TextSegment)]
    assert texts == ["User: ", "\nAssistant:"]


def test_plain_prompts_start_as_the_tokenizer_starts_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.bos_token = "<|start|>"
    turns = [{"role": "user", "content": "Hi"}]
    assert render_chat(tokenizer, turns, add_generation_prompt=True) == "User: Hi\nAssistant:"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    assert render_chat(tokenizer, turns, add_generation_prompt=True) == "<|start|>User: Hi\nAssistant:"


def test_what_the_template_refuses_is_said(talker):
    processor = with_template(talker, STRICT_TEMPLATE)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(
        PromptError, match="refuses these messages: no system role; if it knows no system role"
    ):
        processor(messages, task="text_to_text")


def test_recordings_that_the_template_drops_are_missed(talker, question):
    processor = with_template(talker, "{{ messages[0].role }}")
    messages = [{"role": "user", "content": [{"type": "audio", "audio": question}]}]
    with pytest.raises(PromptError, match="kept 0 of 1 recordings"):
        processor(messages, task="asr")


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        ("chatml", [], ["<|end|>"]),
        (STRICT_TEMPLATE, [], ["<|end|>"]),
        (None, [0], ["<|end|>", "<|pad|>"]),
    ],
)
def test_text_ends_where_the_template_ends_a_turn(template, eos, expected):
    tokenizer = make_tokenizer()
    if template != "chatml":
        tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(find_text_end_ids(tokenizer, eos)) == expected


def test_bases_without_any_end_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(PromptError, match=r"no end-of-turn id.*pass text_end_ids="):
        find_text_end_ids(tokenizer, [])


def test_original_prompts_have_no_chat_template(talker, question):
    marks = TextMarks(end=300, pad=301, input=302, answer=303, asr=304)
    config = replace(talker.config, prompt_format="mini_omni", text_marks=marks)
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    text = processor([{"role": "user", "content": "Yes"}], task="text_to_text").layout.grid[-1].tolist()
    assert text == [302, *talker.tokenizer("Yes")["input_ids"], 300, 303]
    read = processor([{"role": "user", "content": "Yes"}], task="tts").layout.grid[-1].tolist()
    assert read == text
    spoken = (
        processor([{"role": "user", "content": [{"type": "audio", "audio": question}]}], task="asr")
        .layout.grid[-1]
        .tolist()
    )
    assert spoken == [302, *[301] * (len(spoken) - 3), 300, 304]


def test_fingerprints_tell_tokenizers_apart():
    first, second = make_tokenizer(), make_tokenizer()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    second.add_tokens(["new"])
    assert (
        tokenizer_fingerprint(first)["tokenizer_sha256"] != tokenizer_fingerprint(second)["tokenizer_sha256"]
    )


def test_broken_recordings_are_named(talker, tmp_path):
    path = tmp_path / "not-there.wav"
    with pytest.raises(AudioError, match=r"not-there\.wav"):
        talker.processor([{"role": "user", "content": [{"type": "audio", "audio": path}]}], task="asr")


# --- a recording that is still being spoken ---


def asked(source, *, before="", after="", earlier=()):
    texts = [{"type": "text", "text": text} for text in (before, after)]
    parts = [
        *(texts[:1] if before else []),
        {"type": "audio", "audio": source},
        *(texts[1:] if after else []),
    ]
    return [*earlier, {"role": "user", "content": parts}]


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("Listen: ", ""), ("", " and answer")])
def test_an_open_prompt_closes_to_the_whole_one(talker, question, marks, before, after):
    processor = OmniProcessor(
        talker.tokenizer, talker.processor.log_mel, config=replace(talker.config, recording_marks=marks)
    )
    earlier = (*asked(question), {"role": "assistant", "content": "Paris."})
    for task in ("speech_to_speech", "speech_to_text", "asr"):
        whole = processor(asked(question, before=before, after=after, earlier=earlier), task=task)
        prompt = processor.open(asked(BEING_SPOKEN, before=before, after=after, earlier=earlier), task=task)
        grid, spans = prompt.close(whole.layout.spans[-1].length)
        assert torch.equal(grid, whole.layout.grid)
        assert spans == whole.layout.spans
        assert len(prompt.recordings) == 1
        assert torch.equal(prompt.recordings[0][0].values, whole.recordings[0][0].values)


@pytest.mark.parametrize("prompt_format", ["mini_omni", "slam_omni"])
def test_an_open_prompt_in_the_layouts_of_others(talker, question, prompt_format):
    marks = TextMarks(end=1, pad=2, input=3, answer=4, asr=5)
    config = replace(talker.config, prompt_format=prompt_format, text_marks=marks)
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    for task in ("speech_to_speech", "speech_to_text", "asr"):
        whole = processor(asked(question), task=task).layout
        grid, spans = processor.open(asked(BEING_SPOKEN), task=task).close(whole.spans[0].length)
        assert torch.equal(grid, whole.grid)
        assert spans == whole.spans


def test_open_prompts_need_one_recording_that_is_being_spoken(talker, question):
    with pytest.raises(PromptError, match="still being spoken; lay it out with open"):
        talker.processor(asked(BEING_SPOKEN), task="asr")
    twice = (*asked(BEING_SPOKEN), {"role": "assistant", "content": "Yes?"})
    for messages in (asked(question), asked(BEING_SPOKEN, earlier=twice), asked(question, earlier=twice)):
        with pytest.raises(PromptError, match="one recording that is being spoken, the last of all"):
            talker.processor.open(messages, task="asr")


def test_talkers_that_hear_in_blocks_get_features_in_blocks(talker, question):
    config = replace(talker.config, encoder_block_seconds=0.2)
    processor = OmniProcessor(talker.tokenizer, talker.processor.log_mel, config=config)
    assert processor.block_frames == 20
    assert processor.encoder_mark != talker.processor.encoder_mark
    sample = processor(asked(question), task="asr")
    (waveform,) = processor.apply_chat_template(asked(question))[1]
    (expected,) = processor.log_mel.windows(waveform, block_frames=20)
    assert torch.equal(sample.recordings[0][0].values, expected.values)


def test_blocks_go_with_true_lengths(talker):
    with pytest.raises(
        ValueError, match='encoder_block_seconds goes with encoder_padding="true_length" only'
    ):
        replace(talker.config, encoder_block_seconds=0.2, encoder_padding="window")
