"""Forging with known cues, cue questions, and the instruction set."""
