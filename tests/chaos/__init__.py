"""Chaos: a manager, two decoders and many streams, with every process killed, stopped and restarted at random.

`python -m tests.chaos --seeds 0:20` runs seeds and prints a line for each. A seed fixes everything but the timing.
"""
