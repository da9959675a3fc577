"""Measure how well a talker that was trained on whole windows hears in blocks, that is while one speaks.

    python examples/hearing_in_blocks.py TALKER question.wav …

For each kind of block: by how much encoder frames and what the language model is fed differ from hearing
whole windows (root mean square, relative), and how many written replies stay the same. Talkers that were made
with encoder_block_seconds hear exactly in their own blocks, and in no others.
"""

import sys

from omni_adapter import OmniAdapter
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.generation.streaming import Reply
from omni_adapter.hearing import Blocks, measure_hearing_error

WAYS = (Blocks(0.24, 0), Blocks(0.5, 0), Blocks(1, 0), Blocks(2, 0), Blocks(0.5, 0.5), Blocks(0.5, 1))

talker_name, *questions = sys.argv[1:]
talker = OmniAdapter.from_pretrained(talker_name)
rate = talker.processor.log_mel.sampling_rate
waveforms = [read_waveform(question, sampling_rate=rate) for question in questions]


def answer(**hearing: object) -> list[str]:
    replies = []
    for waveform in waveforms:
        with talker.session(speak=False, max_new_tokens=40, **hearing) as session:
            session.append_audio(waveform, sampling_rate=rate)
            replies.append(Reply.collect(session.reply()).text)
    return replies


exact = answer()
for blocks in WAYS:
    error = measure_hearing_error(talker.model, talker.processor.log_mel, waveforms=waveforms, blocks=blocks)
    rough = answer(hearing="blocks", block_seconds=blocks.seconds, lookahead_seconds=blocks.lookahead_seconds)
    same = sum(one == other for one, other in zip(exact, rough, strict=True))
    print(
        f"blocks of {blocks.seconds:g} s, {blocks.lookahead_seconds:g} s ahead: frames {error.frames:.1%}, "
        f"embeddings {error.embeddings:.1%}, {same} of {len(questions)} replies the same"
    )
