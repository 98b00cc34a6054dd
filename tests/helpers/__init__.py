"""Builders of problems, and the rule that says when two answers are the same."""
