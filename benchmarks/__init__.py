"""Measurements of quality and cost; each module is one command of the Makefile."""
