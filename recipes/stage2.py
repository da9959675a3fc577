"""Stage 2, adaptation: the language model learns to answer what it hears, in text.

    accelerate launch recipes/stage2.py --config recipes/configs/adapt.yaml \
        --start runs/align/talker --data rows.parquet

The base learns through LoRA (or whole, with model.lm=full), what stage 1 taught is frozen. The tasks are
transcribing, spoken questions and written ones, each answered in text. The result is in runs/adapt/talker.
"""

import sys

from omni_adapter.train import run

if __name__ == "__main__":
    sys.exit(run("adapt"))
