"""Put a trained talker and all its parts into one small folder: weights in half precision.

    python examples/tiny_talker/ship.py build/tiny/llama/finetune/talker --out build/tiny/talker-llama

The configs go on to say float32, so that the weights are read into full precision: half precision is only how
they lie on the disk. The codec's codebooks stay as they are, since a codec is recognised by them.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from omni_adapter import OmniAdapter

LARGEST_BYTES = 40 * 10**6
DATASETS = {"the tiny world of examples/tiny_talker": "apache-2.0"}


def halve(path: Path) -> None:
    """Rewrite a file of weights in half precision, all but codebooks."""
    weights = load_file(path)
    for name, weight in weights.items():
        stays = "codebook" in name or not weight.is_floating_point()
        halved = weight if stays else weight.half()
        if not halved.isfinite().all():
            raise ValueError(f"{path}: {name} holds values beyond half precision")
        weights[name] = halved
    save_file(weights, path, metadata={"format": "pt"})


def ship(source: Path, out: Path) -> int:
    """Write the talker of ``source`` into ``out``; return the bytes of its weights."""
    talker = OmniAdapter.from_pretrained(source, dtype="float32")
    talker.save_pretrained(out, include=("base", "encoder", "codec"), name=out.name, datasets=DATASETS)
    files = sorted(out.rglob("*.safetensors"))
    for path in files:
        halve(path)
    config = out / "base" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    OmniAdapter.from_pretrained(out)  # it loads
    return sum(path.stat().st_size for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a trained talker into one small folder.")
    parser.add_argument("source", type=Path, help="folder of the trained talker")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    size = ship(arguments.source, arguments.out)
    if size > LARGEST_BYTES:
        raise SystemExit(f"{size / 1e6:.1f} MB of weights, at most {LARGEST_BYTES / 1e6:.0f} MB may ship")
    print(f"{arguments.out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
