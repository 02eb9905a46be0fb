"""Evaluators that this project trains itself, where published weights are missing."""
