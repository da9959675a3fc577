"""Answer several spoken questions at once: one batch, each reply as if it were alone.

python examples/batch_of_questions.py TALKER first.wav second.wav …
"""

import sys
from pathlib import Path

from omni_adapter import OmniAdapter
from omni_adapter.audio.waveform import write_wav

talker_name, *questions = sys.argv[1:]
talker = OmniAdapter.from_pretrained(talker_name)

conversations = [
    [{"role": "user", "content": [{"type": "audio", "audio": question}]}] for question in questions
]
for question, reply in zip(questions, talker.chat_many(conversations, max_new_tokens=40), strict=True):
    out = Path(question).with_suffix(".reply.wav")
    write_wav(out, reply.audio, sampling_rate=reply.sampling_rate)
    print(f"{question}: {reply.text!r}, {reply.duration_s:.1f} s in {out}")
