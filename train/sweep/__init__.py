"""Many runs from one command: which ones (space, search), each in a process of its own (processes), told as they go.

A sweep is a folder. Everything about it is read from there, so that it goes on after any death where it was.
"""
