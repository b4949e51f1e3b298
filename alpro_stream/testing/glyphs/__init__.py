"""A generated corpus: clips of glyph objects with colours that enter, move, stop and leave, and what is said of them.

Everything about a clip is known (`scene.Scene`), so that what a model learned can be asked for one thing at a time:
names of objects in a region, which colour belongs to which noun, the direction of a movement, what only some frames
show.
"""
