"""Answer whoever asks, whenever they ask: many conversations share the model, each reply as if it were alone.

python examples/serve_many.py TALKER first.wav second.wav …
"""

import sys
import threading
import time
from pathlib import Path

from omni_adapter import OmniAdapter
from omni_adapter.audio.waveform import WavWriter

talker_name, *questions = sys.argv[1:]
talker = OmniAdapter.from_pretrained(talker_name)


def ask(question: str) -> None:
    """What a server does for each of its callers, in a thread of its own."""
    out, first_audio_s = Path(question).with_suffix(".reply.wav"), None
    with WavWriter(out, sampling_rate=talker.sampling_rate) as wav:
        for chunk in server.submit(question, max_new_tokens=40):
            if first_audio_s is None and len(chunk.audio):
                first_audio_s = chunk.elapsed_s
            wav.write(chunk.audio)  # goes to the caller as it comes
    print(
        f"{question}: first sound after {first_audio_s:.2f} s, {wav.num_samples / talker.sampling_rate:.1f} s"
    )


with talker.serve(max_conversations=4) as server:
    callers = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for caller in callers:
        caller.start()
        time.sleep(0.05)  # they do not come all at once
    for caller in callers:
        caller.join()
    print(f"{server.most_together} conversations took their steps together")
