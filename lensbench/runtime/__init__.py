"""What a run stands on: files, stages, processes, memory, progress, environment."""
