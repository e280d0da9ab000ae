"""Programs that each answered one question of LOG.md: run by hand, not tested, imported by nothing."""
