"""Ask the talker that comes with the package a spoken question, all on this machine: what `make talk` runs.

    python examples/talk_offline.py [FOLDER] [--question WAV]

A synthesizer speaks the question, unless you bring a recording of your own, and the command line
answers it in writing and in speech. The files go to FOLDER, `build` by default.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

QUESTION = "what color is the sky blue or red"


def speak(text: str, path: Path) -> None:
    """Write spoken text to a wav file with a synthesizer that is at hand."""
    lines = {"flite": ["-voice", "slt", "-t", text, "-o", str(path)], "espeak-ng": ["-w", str(path), text]}
    for program, arguments in lines.items():
        if shutil.which(program):
            subprocess.run([program, *arguments], check=True)
            return
    sys.exit(
        f"no synthesizer found; install one of {', '.join(lines)}, for example: apt-get install espeak-ng"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the talker that comes with the package a question.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build"), help="where the files go")
    parser.add_argument("--question", type=Path, help="a recording of your own instead of the synthesizer's")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    question = arguments.question or folder / "question.wav"
    if arguments.question is None:
        speak(QUESTION, question)
        print(f"question: {QUESTION!r}, spoken into {question}")
    talk = ["talk", str(question), "--out", str(folder / "reply.wav")]
    print(f"running:  omni-adapter {shlex.join(talk)}\n", flush=True)
    done = subprocess.run([sys.executable, "-m", "omni_adapter", *talk], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
