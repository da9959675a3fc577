"""Stage 3, fine-tuning: everything learns together, from all tasks; then annealing on the best data.

    accelerate launch recipes/stage3.py --config recipes/configs/finetune.yaml \
        --start runs/adapt/talker --data rows.parquet
    accelerate launch recipes/stage3.py --config recipes/configs/anneal.yaml \
        --start runs/finetune/talker --data best.parquet

The results are in runs/finetune/talker and runs/anneal/talker: omni-adapter talk speaks with them.
"""

import sys

from omni_adapter.train import run

if __name__ == "__main__":
    sys.exit(run("finetune", also=("anneal",)))
