"""Pictures of a run: from numbers and images to figures. Nothing here reads or writes a run.

Colours are those of Okabe & Ito (Color Universal Design), and cividis for maps: both can be told apart by everybody.
"""
