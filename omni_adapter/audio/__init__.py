"""Sound, features and codes: what flows between a recording and a code grid. Knows no language model."""
