"""From batches to a trained talker: stages, losses, the loop, checkpoints and the report."""
