"""Plots of a run: functions from numbers and images to figures. Nothing here reads or writes a run.

The palette is that of Okabe & Ito (Color Universal Design), the colour map cividis; both suit colour-blind readers.
"""
