"""Stream a spoken reply: print the text and write the sound while they are made.

python examples/stream_to_file.py TALKER question.wav reply.wav
"""

import sys

from omni_adapter import OmniAdapter
from omni_adapter.audio.waveform import WavWriter

talker_name, question, out = sys.argv[1:4]
talker = OmniAdapter.from_pretrained(talker_name)

with WavWriter(out, sampling_rate=talker.sampling_rate) as wav:
    for chunk in talker.stream(question, max_new_tokens=60):
        print(chunk.text, end="", flush=True)
        wav.write(chunk.audio)  # the file can be played from the first chunk on
print(f"\n{wav.num_samples / talker.sampling_rate:.1f} s of sound in {out}, finished: {chunk.finish_reason}")
