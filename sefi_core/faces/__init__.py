"""Faces in pictures: detectors, the shapes around a face, masks and crops."""
