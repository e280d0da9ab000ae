"""The chat demo in a browser: `python -m app`. Run from a checkout; needs the extra `[app]`."""
