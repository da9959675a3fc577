"""Stage 1, alignment: the talker learns to hear and to speak, while its language model stays as it is.

    accelerate launch recipes/stage1.py --config recipes/configs/align.yaml --base ID --data rows.parquet

Audio adapter, code embedding, TTS blocks and code heads learn, from transcribing (asr) and reading aloud
(tts). The same command goes on after a stop; with --dry-run it shows what it would do. The result is in
runs/align/talker.
"""

import sys

from omni_adapter.train import run

if __name__ == "__main__":
    sys.exit(run("align"))
