"""Kinds of identity, one module for each."""
