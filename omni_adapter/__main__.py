"""``python -m omni_adapter`` is the command ``omni-adapter``."""

from omni_adapter.cli import main

main()
