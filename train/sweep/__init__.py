"""Many runs from one command: search space, search algorithms, worker processes and a live table of the trials.

A sweep is a folder. Its whole state is read from there, so that it resumes where it was after any kill.
"""
