"""Procedural data sets: scenes and sentences made from one program, written in a public layout."""
