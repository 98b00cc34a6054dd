"""Turns instance specifications into sources, objects, one library and its manifest."""
