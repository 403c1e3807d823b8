"""Layers: programs that a machine has beside those of its image, such as one server of tools from npm or PyPI.

A layer is a squashfs of its own, at a locked version with a hash for each part. Machines are copied from the one
template that all others are; the layer is a disk of that copy, mounted so that it can replace nothing of the image.
"""
