"""Versions of what is written to disk and read again by later versions of this project; nothing here loads torch."""

CACHE = 1  # decoded images, cifar/data/cache.py
RUN = 1  # config.json of a finished run and state.json of a checkpoint, with the weights beside them
