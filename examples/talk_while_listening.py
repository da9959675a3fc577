"""Let a talker hear a question while it is spoken, and see how soon it answers.

    python examples/talk_while_listening.py TALKER question.wav [exact|blocks]

The file comes in pieces of 100 ms, as fast as a microphone would bring them. A talker that was made with
encoder_block_seconds has encoded and read nearly all of the question when it ends; others encode it then,
unless "blocks" is asked for, which is an approximation for them.
"""

import sys
import time

import soundfile

from omni_adapter import OmniAdapter

PIECE_S = 0.1

talker_name, question = sys.argv[1:3]
hearing = sys.argv[3] if len(sys.argv) > 3 else "exact"
talker = OmniAdapter.from_pretrained(talker_name)

with soundfile.SoundFile(question) as file, talker.session(hearing=hearing, max_new_tokens=40) as session:
    size, longest = round(PIECE_S * file.samplerate), 0.0
    due = time.perf_counter()
    for piece in file.blocks(size, dtype="float32"):
        due += len(piece) / file.samplerate
        time.sleep(max(0.0, due - time.perf_counter()))  # the piece is not over before
        began = time.perf_counter()
        session.append_audio(piece, sampling_rate=file.samplerate)
        longest = max(longest, time.perf_counter() - began)
    print(f"{session.heard_s:.1f} s heard as they were spoken; a piece took at most {longest * 1000:.0f} ms")
    behind_s = time.perf_counter() - due
    for chunk in session.reply():
        if len(chunk.audio):
            print(f"end of the question -> first sound: {(behind_s + chunk.elapsed_s) * 1000:.0f} ms")
            break

for chunk in talker.stream(question, max_new_tokens=40):
    if len(chunk.audio):
        print(f"the same with the whole recording: {chunk.elapsed_s * 1000:.0f} ms")
        break
