"""The back stage: settings, files, checks and speed. To follow the algorithm, skip it."""
