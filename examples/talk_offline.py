"""Ask a talker a spoken question, all on this machine: what `make talk` runs.

    python examples/talk_offline.py [FOLDER]

A synthesizer speaks the question, a small talker with random weights is built once, and then the real command
line answers it. The files go to FOLDER, `build` by default.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from transformers.utils import logging
from untrained_talker import build_untrained_talker

QUESTION = "What is the capital of France?"
MAX_NEW_TOKENS = 120


def speak(text: str, path: Path) -> None:
    """Write spoken text to a wav file with a synthesizer that is at hand."""
    lines = {"espeak-ng": ["-w", str(path), text], "flite": ["-t", text, "-o", str(path)]}
    for program, arguments in lines.items():
        if shutil.which(program):
            subprocess.run([program, *arguments], check=True)
            return
    sys.exit(
        f"no synthesizer found; install one of {', '.join(lines)}, for example: apt-get install espeak-ng"
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    question, talker, reply = folder / "question.wav", folder / "talker", folder / "reply.wav"
    speak(QUESTION, question)
    print(f"question: {QUESTION!r}, spoken into {question}")
    logging.disable_progress_bar()
    if not (talker / "omni_config.json").is_file():
        build_untrained_talker(talker)
    print(f"talker:   {talker}, small and UNTRAINED: its words and its voice are noise until it is trained")
    options = ["--model", str(talker), "--out", str(reply), "--max-new-tokens", str(MAX_NEW_TOKENS)]
    print(f"running:  omni-adapter talk {question} {' '.join(options)}\n", flush=True)
    talk = subprocess.run(
        [sys.executable, "-m", "omni_adapter", "talk", str(question), *options], check=False
    )
    sys.exit(talk.returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
