"""Which read is the faster one on this machine: both are timed once per machine and kind of read, and the result is kept.

``measure`` times the aligned read and the 16-bit stream over made-up caches of several contexts, ``crossover`` says from which
context on the first is the faster, ``records`` keeps that in a file beside Inductor's caches, and ``options`` gives the passes
the user's options with ``min_context`` answered by it.
"""

from .options import priced as priced
